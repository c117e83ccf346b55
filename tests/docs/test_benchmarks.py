"""The benchmarks: their arithmetic, worked by hand, and a smoke run of every script."""

import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from agents import demo_model
from tests.helpers.command import ROOT
from textenv import demo

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
    monkeypatch.setattr(work, "time", SimpleNamespace(process_time=lambda: next(now)))
    calls = []

    def piece(name, amount):
        calls.append(name)
        return amount

    result = work.pairs(lambda: piece("a", 8), lambda: piece("b", 4), n_pairs=3)
    assert "".join(calls) == "ab" * 4  # one warm-up of each, then three pairs in turns
    assert (result.a, result.b) == (4, 2)
    assert result.ratios == [4, 2, 1]
    assert (result.ratio, result.spread, result.peaks) == (2, "1.00-4.00", None)


class Device:
    """A stand-in for `torch.cuda`: a run takes 500 ms of its clock, and raises the peak to 3 GB from 1 GB held."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(**options):
            self.calls.append(name)
            return {"memory_allocated": 1e9, "max_memory_allocated": 3e9}.get(name, self)

        return call

    def elapsed_time(self, end):
        return 500.0


def test_a_timing_on_a_device_by_hand(work, monkeypatch):
    """Work that was queued before is waited for, and the peak begins anew."""
    device = Device()
    monkeypatch.setattr(work, "torch", SimpleNamespace(cuda=device))
    timing = work.timed(lambda: device.calls.append("run") or 8, "cuda")
    assert timing == (0.5, 8, 2.0)
    assert device.calls[:3] == ["synchronize", "reset_peak_memory_stats", "memory_allocated"]
    assert device.calls[-5:] == ["record", "run", "record", "synchronize", "max_memory_allocated"]
    result = work.pairs(lambda: 8, lambda: 4, n_pairs=2, device="cuda")
    assert (result.a, result.b, result.ratio, result.peaks) == (16, 8, 2, (2.0, 2.0))


def test_table_by_hand(work):
    row = work.Row("speed", "3 tokens/s", "2 tokens/s", 1.5, "1.40-1.60", ">= 1.25x", True)
    missing = work.Row.missing("peer", "pip install peer", ">= 2x")
    rows = [row, row._replace(ratio=1.0, met=False), missing, row._replace(peaks=(1.5, 0.25))]
    assert work.table(rows).splitlines()[2:] == [
        "| speed | 3 tokens/s | 2 tokens/s | 1.50 | 1.40-1.60 | >= 1.25x | yes |",
        "| speed | 3 tokens/s | 2 tokens/s | 1.00 | 1.40-1.60 | >= 1.25x | NO |",
        "| peer | - | pip install peer | - | - | >= 2x | - |",
        "| speed | 3 tokens/s; peak 1.50 GB | 2 tokens/s; peak 0.25 GB | 1.50 | 1.40-1.60 | >= 1.25x | yes |",
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
    printed = run(f"benchmarks/{name}.py", *words, f"--json={path}")
    return json.loads(path.read_text()), printed


def run(*words):
    """Run a script as its words say, and return its output."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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
            if row["theirs"].endswith("--model FOLDER"):  # no real model is at hand
                continue
            # A smoke-sized update may fit in memory that the process already holds: its peak then grows by nothing.
            assert row["ratio"] > 0 or (row["ratio"] == 0 and "growth of the peak" in row["claim"]), row
            assert re.search(r"\d", row["ours"]) and re.search(r"\d", row["theirs"])
    assert sum(row["target"] == "drawn in growth.png" for row in rows) == 3


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
    (equal, ragged, ahead), _ = run_script(tmp_path, "engine", "--smoke")
    assert equal["ratio"] > 0 and ragged["ratio"] > 0 and "equal lengths" in equal["claim"]
    assert ahead["ratio"] > 0 and "written ahead" in ahead["claim"]


@pytest.mark.slow
def test_the_critic_runs(tmp_path):
    """A run adds a line, and is not repeated."""
    for mood in ("neg", "pos"):
        (tmp_path / f"rt-polarity.{mood}").write_text("\n".join(demo.reviews(300, seed=len(mood))) + "\n")
    words = (f"--model={demo_model(n_epochs=0.2)}", f"--reviews={tmp_path}", f"--json={tmp_path / 'rows.json'}")
    words = ("benchmarks/critic.py", *words, "--smoke", "--seeds=0", "--gradients", "--settings")
    run(*words, "grpo", "shared")
    printed = run(*words, "shared", "none", "warmup")
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [row["setting"] for row in rows] == ["grpo", "shared", "none", "warmup"]
    assert all(len(row["curve"]) == 2 and -1 <= row["sampled"] <= 1 for row in rows)
    assert rows[1]["curve"][1]["value_std"] > 0 == rows[2]["curve"][1]["value_std"]
    assert rows[1]["curve"][1]["norm_value_trunk"] > 0 and printed.count("| 1 |") == 3


@pytest.fixture
def real(work):
    import real

    return real


def curve_of(*points):
    """Return a curve from completions and seconds so far, and the score of an iteration."""
    return [dict(zip(("completions", "seconds", "score"), point, strict=True)) for point in points]


# Iterations of 8, 8, 16 and 8 completions. The means of two in a row are (0 + 0.4) / 2, (8 * 0.4 + 16 * 0.1) / 24 and
# (16 * 0.1 + 8 * 0.7) / 24: the third iteration, with most completions, is worse than the second.
CURVE = curve_of((8, 10, 0.0), (16, 20, 0.4), (32, 45, 0.1), (40, 60, 0.7))


def test_seconds_to_a_reward_by_hand(real):
    assert real.smoothed(CURVE, 2) == pytest.approx([0.2, 0.2, 0.3])
    assert real.smoothed(CURVE, 1) == pytest.approx([0.0, 0.4, 0.1, 0.7])
    assert real.smoothed(CURVE, 5) == []
    assert [real.seconds_to_reward(CURVE, reward, 2) for reward in (-1, 0.15, 0.25, 0.4)] == [20, 20, 60, None]
    assert [real.seconds_to_reward(CURVE, reward, 1) for reward in (0, 0.4, 0.5)] == [10, 20, 60]
    assert [real.score_at(CURVE, n, 2) for n in (8, 16, 33)] == pytest.approx([0.2, 0.2, 0.3])


def test_rows_of_both_sides_by_hand(real):
    """TRL takes 3, 2 and 2.5 times our seconds; a run that does not get there has no ratio."""
    row = real.seconds_row("to 0.5", [10, 20, 40], [30, 40, 100])
    assert row[:2] == ("to 0.5", "20.0 s (10.0 to 40.0)") and row.theirs == "40.0 s (30.0 to 100.0)"
    assert row[3:7] == (2.5, "2.00-3.00", ">= 2.0x", True)
    assert real.seconds_row("", [10, 20], [15, 30]).met is False
    late = real.seconds_row("", [10, 20], [30, None])
    assert (late.theirs, late.ratio, late.met) == ("30.0 s (30.0 to 30.0), 1 of 2 seeds", 3, None)
    assert real.seconds_row("", [10, None], [30, 50]).met is False
    none = real.seconds_row("", [None], [None])
    assert (none.ours, none.ratio, none.spread, none.met) == ("not reached", None, "-", None)
    figures = real.figure_row("held out", [0.5, 0.75], [0.25, 1.0])
    assert (figures.ours, figures.theirs) == ("0.62 (0.50 to 0.75)", "0.62 (0.25 to 1.00)")
    assert (figures.spread, figures.met) == ("difference -0.25 to +0.25", None)


def test_a_point_adds_an_iteration_to_the_sums(real):
    first = real.after([], real.Done(tokens=96, optimizer_steps=8, seconds=2.0, completions=4, score=0.5))
    second = real.after([first], real.Done(tokens=90, optimizer_steps=8, seconds=1.5, completions=5, score=0.25))
    assert second == {"completions": 9, "tokens": 186, "optimizer_steps": 16, "seconds": 3.5, "score": 0.25}


def test_a_line_of_runs_is_found_by_its_key(work, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert work.find_line(None, {}) is None and work.find_line(path, {}) is None
    work.add_line(None, {"seed": 0})
    for seed in (0, 1):
        work.add_line(path, {"side": "ours", "seed": seed})
    assert work.find_line(path, {"seed": 1}) == {"side": "ours", "seed": 1}
    assert work.find_line(path, {"seed": 1, "side": "trl"}) is None


def smoke_of_both(folder, *words):
    """Run `real.py` on a tiny model and made-up reviews; return the lines of its file, and its output."""
    for mood in ("neg", "pos"):
        (folder / f"rt-polarity.{mood}").write_text("\n".join(demo.reviews(300, seed=len(mood))) + "\n")
    path = folder / "rows.jsonl"
    words = (f"--model={demo_model(n_epochs=0.2)}", f"--reviews={folder}", f"--json={path}", *words)
    printed = run("benchmarks/real.py", *words, "--smoke", "--rewards", "-1", "9")
    return [json.loads(line) for line in path.read_text().splitlines()], printed


@pytest.mark.slow
def test_our_side_of_a_real_model_runs(tmp_path):
    """The start and each seed add a line, and are not repeated; the evaluator sees what has been trained."""
    smoke_of_both(tmp_path, "--sides=ours", "--seeds=0")
    rows, printed = smoke_of_both(tmp_path, "--sides=ours", "--seeds", "0", "1")
    assert [(row["side"], row.get("seed")) for row in rows] == [("start", None), ("ours", 0), ("ours", 1)]
    for row in rows[1:]:
        assert [point["optimizer_steps"] for point in row["curve"]] == [8, 16, 24]
        assert row["curve"][-1]["completions"] >= 48 and row["held_out"]["perplexity"] > 0
        assert row["held_out"] != rows[0]["held_out"]
    assert "to a reward of 9.0 | not reached | not measured |" in printed
    assert re.search(r"to a reward of -1.0 \| \d+\.\d s \(.*\) \| not measured \|", printed)


@pytest.mark.slow
@pytest.mark.skipif("TRL_GRPO_PYTHON" not in os.environ, reason="needs a Python with TRL 1.16: set TRL_GRPO_PYTHON")
def test_both_sides_of_a_real_model_run(tmp_path):
    """Both sides do the same number of steps on the same number of completions, and TRL's adapters arrive."""
    (start, ours, theirs), printed = smoke_of_both(tmp_path, "--seeds=0")
    assert (ours["side"], theirs["side"]) == ("ours", "trl") and "not measured" not in printed
    steps, completions = ([point[name] for point in theirs["curve"]] for name in ("optimizer_steps", "completions"))
    assert steps == [point["optimizer_steps"] for point in ours["curve"]][: len(steps)]
    assert completions == [16, 32, 48]
    assert theirs["held_out"] != start["held_out"]


@pytest.mark.slow
def test_the_rows_of_a_gpu_run_on_a_cpu(tmp_path):
    """All rows in both types, and pytest's word on the tests that need a device."""
    run("benchmarks/gpu.py", f"--out={tmp_path}", "--device=cpu", "--smoke")
    report = json.loads((tmp_path / "gpu.json").read_text())
    n_tests = (ROOT / "tests" / "whole" / "test_gpu.py").read_text().count("\ndef test_")
    if not torch.cuda.is_available():
        assert re.match(rf"{n_tests} skipped in", report["tests"]["summary"])
    assert "needs a CUDA device" in (tmp_path / "tests.txt").read_text() or torch.cuda.is_available()
    claims = {row["claim"]: row for row in report["rows"]}
    peers = ("equal lengths, against generate", "equal lengths, against generate_batch", "groups of 4, P4 T8, against")
    ended = "rollout, ended by EOS (mean 30, cap 8), against generate"
    updates = ("update, equal", "update, limits of 2 to 8", "update, groups of 4")
    starts = (*(f"rollout, {peer}" for peer in peers), ended, f"{ended}_batch", *updates, "PPO iteration with KL (k1)")
    for start, dtype in itertools.product(starts, ("float32", "bfloat16")):
        assert any(claim.startswith(start) and claim.endswith(f", {dtype}") for claim in claims), (start, dtype)
    assert all(row["ratio"] > 0 and row["peaks"] is None for row in claims.values())
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("Commit ") and page.count("\n| ") == len(claims) + 1


def test_the_work_of_saved_weights_has_their_vocabulary(work, tmp_path):
    """The floor and `generate` read all of a model's tokens, so that ours must, too."""
    import gpu

    gpu.save_random_model(work.Work(n_layer=1, width=48, n_head=3, vocab_size=100), str(tmp_path))
    own = gpu.GpuSettings(smoke=True, model=str(tmp_path), autocast="bfloat16").work(new_tokens=3)
    assert (own.vocab_size, own.new_tokens, own.n_lanes) == (100, 3, 4)
    model = own.agent()
    assert model.policy.lm.backbone.vocab_size == 100 and model.policy.lm.autocast == "bfloat16"
    weight, copied = (
        lm.get_output_embeddings().weight for lm in (model.policy.lm.backbone.model, own.plain_model(model))
    )
    assert (weight.dtype, copied.dtype) == (torch.float32, torch.bfloat16)


def test_a_late_row_and_one_that_raises_say_so(work, capsys):
    import gpu

    def broken_rows(settings):
        raise RuntimeError("no kernel | here")

    settings, now = gpu.GpuSettings(), gpu.time.monotonic()
    assert gpu.measure_in_time(broken_rows, settings, now)[0].theirs == "raised RuntimeError: no kernel / here"
    (late,) = gpu.measure_in_time(broken_rows, settings, now - 500)
    assert late.claim == "broken rows" and late.theirs.startswith("not started: 5") and late.ratio is None
    assert "no kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device=cpu"], "Expected --device cpu with --smoke"), ([], "Expected a CUDA device, got none")],
)
def test_the_gpu_script_refuses_a_cpu(words, message, work, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out=somewhere", *words])
    with pytest.raises(SystemExit):
        gpu.arguments()
    assert message in capsys.readouterr().err
