"""The benchmarks of several processes: the simulated schedule and the arithmetic for GPUs, worked by hand."""

import json
import re
import subprocess
import sys

import pytest

from tests.docs.test_benchmarks import FOLDER, run
from tests.helpers.command import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_scale_on_paper_by_hand():
    """7 B parameters on 8 GPUs: 20 bytes each, a ring that sends 7/8 of the gradient twice, 24 operations a token.

    Shards hold an eighth of that and two copies in 16 bits; they send 7/8 of the weights in 16 bits twice, and of the
    gradient once. 64 lanes are 8 prompts of 512 tokens, which copies read once each, and shards once in the rollout.
    """
    from scale_on_paper import Plan, choose, table

    plan = Plan(7, 8, lora=False)
    assert plan.memory == 140e9 and plan.traffic == 2 * 7 / 8 * 28e9
    assert plan.update_seconds == pytest.approx(24 * 7e9 * (64 + 8) * 512 / 395.6e12)
    assert plan.reference_seconds == pytest.approx(plan.update_seconds / 12)
    assert plan.rollout_seconds == pytest.approx(512 * 32 * 0.6e-3 + 2 * 7e9 * 8 * 512 / 395.6e12)
    alone = Plan(7, 8, lora=False, shares_prompts=False)
    assert alone.update_seconds / plan.update_seconds == pytest.approx(128 / 72)
    assert Plan(7, 8, False, "sharded").update_seconds == alone.update_seconds
    assert Plan(7, 8, False, "sharded").read_tokens(in_rollout=True) == 8 * 512
    spent = plan.reference_seconds + plan.update_seconds + plan.rollout_seconds + 32 * plan.traffic / 300e9
    assert plan.tokens_per_second == pytest.approx(8 * 64 * 512 / spent)
    assert Plan(7, 8, lora=True).memory == pytest.approx(14.56e9)
    sharded = choose(7, 8, lora=False)
    assert sharded.way == "sharded" and sharded.memory == 140e9 / 8 + 2 * 14e9
    assert sharded.traffic == 7 / 8 * (2 * 14e9 + 28e9) and sharded.rollout_traffic == 7 / 8 * 2 * 14e9
    lock_step = Plan(70, 8, lora=True, way="lock-step")
    assert lock_step.rollout_traffic == 512 * 7 / 8 * 140e9
    assert lock_step.memory == pytest.approx((140e9 + 16 * 0.005 * 70e9) / 8 + 2 / 80 * 140e9)
    assert table() in (ROOT / "docs" / "scaling.md").read_text()


def test_a_schedule_by_hand():
    """A rollout of 2 s (4 s in the slower process), 2 steps of 1 s, traffic of 0.5 s after each."""
    from schedule import Costs, simulate

    costs = Costs(rollout=2.0, reference=0.5, step=1.0, n_steps=2, traffic=0.5)
    assert simulate(costs, 2, 2)["seconds"] == simulate(costs, 1, 1)["seconds"] == 5.5
    assert simulate(costs, 4, 2)["seconds"] == 2 * 2.5 + 2 * (2 * 1.0 + 0.5), "4 processes share 2 cores, not the link"
    by_core = simulate(Costs(**{**vars(costs), "is_sent_by_core": True}), 4, 2)
    assert by_core["seconds"] == 11 and by_core["traffic"] == 2
    uneven = simulate(costs, 2, 2, slowness=[1.0, 2.0])
    assert uneven["seconds"] == 7.5 and uneven["waits"] == 2.0 and uneven["rollout"] == 2.0
    # On one core both decode at half speed for 4 s; then the slower one has the core for its other 2 s.
    assert simulate(Costs(rollout=2.0, step=0.0, n_steps=0), 2, 1, slowness=[1.0, 2.0])["seconds"] == 6.0


def test_a_simulation_is_compared_with_a_measurement():
    from schedule import compare

    costs = [
        {"processes": n, "rollout": 4.0 / n, "step": 1.0 / n, "n_steps": 8, "traffic": 0.1, "is_sent_by_core": True}
        for n in (1, 2)
    ]
    rows = [{"processes": n, "weights": "copies", "seconds": 12.8 / n, "rollout_share": 0.3} for n in (1, 2)]
    rows = [{**row, "tokens_per_second": 100.0, "cpu_per_token": 0.02} for row in rows]
    table, is_close = compare(costs, rows, cores=2)
    assert is_close and "| 2 | 6.80 s | 6.40 s | 1.06 | 29% | 30% | 1.06 |" in table, (
        "2 * 2 + 8 * 2 * 0.6 processor seconds of 12.8"
    )
    assert not compare(costs, [{**rows[1], "seconds": 5.0}, rows[0]], cores=2)[1]
    assert not compare(costs, [], cores=2)[1], "nothing was compared"


@pytest.mark.long
def test_the_schedule_is_calibrated_and_checked(tmp_path):
    costs, rows = tmp_path / "costs.json", tmp_path / "rows.json"
    run("benchmarks/schedule.py", "calibrate", "--smoke", "--processes", "1", "2", f"--json={costs}")
    small = ("--smoke", "--reference", "--iterations=1", "--weights", "copies", "--processes", "1", "2")
    run("benchmarks/scale.py", *small, f"--json={rows}")
    one, two = json.loads(costs.read_text())
    assert min(one[name] for name in ("rollout", "reference", "step")) > 0 == one["traffic"] < two["traffic"]
    command = [sys.executable, "benchmarks/schedule.py", "check", str(costs), str(rows)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and done.stdout.count("\n| ") == 2, done.stderr


@pytest.mark.slow
def test_an_evaluation_runs_in_one_process():
    """Both ways write the same texts, which the script checks."""
    printed = run("benchmarks/evaluation.py", "--prompts=4", "--tokens=4")
    assert re.search(r"^rank 0 alone: \d+\.\d\d s, shared: \d+\.\d\d s$", printed, flags=re.MULTILINE)
