"""The benchmarks: their arithmetic, worked by hand, and a smoke run of every script."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.command import ROOT

LATE = "rollout, limits of 2 to 8 tokens, a 4-layer classifier"

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def work(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import work

    return work


def test_pairs_by_hand(work, monkeypatch):
    """A takes 1, 2 and 4 s for 8 pieces of work, B always 2 s for 4: speeds 8, 4, 2 and 2, 2, 2."""
    now = itertools.accumulate(itertools.chain.from_iterable((0, a, 0, 2) for a in (1, 2, 4)))
    monkeypatch.setattr(work, "clock", lambda device: next(now))
    calls = []

    def piece(name, amount):
        calls.append(name)
        return amount

    result = work.pairs(lambda: piece("a", 8), lambda: piece("b", 4), n_pairs=3)
    assert "".join(calls) == "ab" * 4  # one warm-up of each, then three pairs in turns
    assert (result.a, result.b) == (4, 2)
    assert result.ratios == [4, 2, 1]
    assert (result.ratio, result.spread) == (2, "1.00-4.00")


def test_table_by_hand(work):
    row = work.Row("speed", "3 tokens/s", "2 tokens/s", 1.5, "1.40-1.60", ">= 1.25x", True)
    rows = [row, row._replace(ratio=1.0, met=False), work.Row.missing("peer", "pip install peer", ">= 2x")]
    assert work.table(rows).splitlines()[2:] == [
        "| speed | 3 tokens/s | 2 tokens/s | 1.50 | 1.40-1.60 | >= 1.25x | yes |",
        "| speed | 3 tokens/s | 2 tokens/s | 1.00 | 1.40-1.60 | >= 1.25x | NO |",
        "| peer | - | pip install peer | - | - | >= 2x | - |",
    ]


def test_attentions_share_by_hand(work):
    """One layer of width 2, 3 tokens: per position, the trunk costs 48, and attention 2 times the positions."""
    import growth

    shape = {"n_layer": 1, "width": 2, "vocab_size": 3, "prompt_tokens": 1}
    short, long = (work.Work(**shape, new_tokens=n) for n in (1, 2))
    assert growth.multiplications(short) == (48 + 2 * 2) * 2 / 1 + 2 * 3
    assert growth.multiplications(long) == (48 + 2 * 3) * 3 / 2 + 2 * 3


def run_script(folder, name, *words):
    """Run a script; return the rows that it writes, and its output."""
    path = folder / "rows.json"
    result = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *words, f"--json={path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text()), result.stdout


@pytest.mark.slow
def test_all_scripts_run(tmp_path):
    rows, printed = run_script(tmp_path, "run", "--quick", "--smoke")
    assert re.search(r"^Commit \w+; Python 3", printed)
    claims = (
        "rollout, ",
        "update, equal",
        "update, LoRA",
        "update, growth",
        "update of a token",
        "update with groups, P40",
        "update without groups",
        "SB3, env",
        "buffer, ",
        "rating page, ",
    )
    for claim in (*claims, "PPO iteration with KL (", "masked step, ", "masks stored, ", LATE):
        rows_of_claim = [row for row in rows if row["claim"].startswith(claim)]
        assert rows_of_claim, claim
        for row in rows_of_claim:
            assert row["ratio"] > 0
            assert re.search(r"\d", row["ours"]) and re.search(r"\d", row["theirs"])
    assert sum(row["target"] == "drawn in growth.png" for row in rows) == 3


def test_scale_on_paper_by_hand(work):
    """7 B parameters on 8 GPUs: 20 bytes each, a ring that sends 7/8 of the gradient twice, 26 operations a token.

    Shards hold an eighth of that and two copies in 16 bits; they send 7/8 of the weights in 16 bits twice, and of the
    gradient once.
    """
    from scale_on_paper import Plan, choose, table

    plan = Plan(7, 8, lora=False)
    assert plan.memory == 140e9 and plan.traffic == 2 * 7 / 8 * 28e9
    assert plan.update_seconds == pytest.approx(26 * 7e9 * 64 * 512 / 395.6e12)
    assert plan.rollout_seconds == pytest.approx(512 * 32 * 0.6e-3)
    assert Plan(7, 8, lora=True).memory == pytest.approx(14.56e9)
    sharded = choose(7, 8, lora=False)
    assert sharded.way == "sharded" and sharded.memory == 140e9 / 8 + 2 * 14e9
    assert sharded.traffic == 7 / 8 * (2 * 14e9 + 28e9) and sharded.rollout_traffic == 7 / 8 * 2 * 14e9
    lock_step = Plan(70, 8, lora=True, way="lock-step")
    assert lock_step.rollout_traffic == 512 * 7 / 8 * 140e9
    assert lock_step.memory == pytest.approx((140e9 + 16 * 0.005 * 70e9) / 8 + 2 / 80 * 140e9)
    assert table() in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.long
def test_scale_runs(tmp_path):
    rows, _ = run_script(tmp_path, "scale", "--smoke", "--processes", "2", "--iterations=1")
    assert [row["weights"] for row in rows] == ["copies", "sharded", "lock-step"]
    for row in rows:
        assert row["processes"] == 2 and row["tokens_per_second"] > 0 and 0 < row["rollout_share"] < 1
        assert row["seen"] == 0 or row["seen"] > row["moved"] > 0, "the loopback has seen the gradients"
    assert 0.4 < rows[1]["kept"] / rows[0]["kept"] < 0.6


@pytest.mark.long
def test_engine_runs(tmp_path):
    (equal, ragged), _ = run_script(tmp_path, "engine", "--smoke")
    assert equal["ratio"] > 0 and ragged["ratio"] > 0 and "equal lengths" in equal["claim"]
