"""Weights sharded over processes: the update of one process, the share of each, files, refusals and lost processes."""

import errno
import pickle
import re
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agents import Sharded, load_checkpoint
from agents.checkpoints.manifest import verify_checkpoint
from agents.distributed.collectives import ProcessLost
from tests.helpers.jobs import options, shared_agent
from tests.helpers.models import seldom
from tests.helpers.processes import accelerate, launch, torchrun, train

SAME = 1e-6
SLOW = pytest.mark.slow
WAYS = {"gathered": Sharded(), "lock-step": Sharded(gather=False), "offloaded": Sharded(offload=True)}
FIRST = {"gathered": Sharded()}
OFTEN = [
    "LoRA",
    "experts",
    "SeparateCritic",
    "gradient_checkpointing",
    "micro_batch_tokens",
    "bfloat16",
    "encoder-decoder",
]
LOCK_STEP = ["SeparateCritic", "micro_batch_tokens", "late"]  # options that are tried in lock-step as well
IN_EVERY_WAY = ["popart", "warmup"]  # options that touch shards between updates, or their gradients


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(np.abs(first[name] - second[name]).max() for name in first)


def check_same(alone, results, tolerance=SAME):
    for result in results:
        for (name, way), (weights, figures) in result.items():
            expected, expected_figures = alone[name, "whole"]
            expected_figures = expected_figures | {"shares": False}  # shards read each sequence whole
            assert largest_difference(weights, expected) < tolerance, (name, way)
            assert figures == pytest.approx(expected_figures, rel=1e-2 if tolerance > SAME else 1e-4), (name, way)


@pytest.mark.parametrize(("size", "ways"), [(2, {"whole": None, **WAYS}), pytest.param(4, FIRST, marks=SLOW)])
def test_the_update_is_that_of_one_process_and_of_whole_weights(size, ways):
    alone = train(1, "sharded_updates", {"whole": None})[0]
    check_same(alone, train(size, "sharded_updates", ways))


@pytest.mark.parametrize("names", seldom([OFTEN, [name for name in options() if name not in IN_EVERY_WAY + OFTEN]]))
def test_the_update_is_the_same_with_every_option(names):
    alone = train(1, "sharded_updates", {"whole": None}, names, timeout=120)[0]
    results = train(2, "sharded_updates", {"gathered": Sharded()}, names, timeout=240)
    for result in results:
        assert len(result) == len(names) > 5
        in_16_bits = {key: value for key, value in result.items() if key[0] == "bfloat16"}
        check_same(alone, [in_16_bits], 1e-3)
        check_same(alone, [{key: value for key, value in result.items() if key not in in_16_bits}])
    lock_step = [name for name in names if name in LOCK_STEP]
    check_same(alone, train(2, "sharded_updates", {"lock-step": Sharded(gather=False)}, lock_step, timeout=120))


@pytest.mark.parametrize("way", seldom(list(WAYS)))
def test_popart_and_a_warm_up_work_on_shards(way):
    alone = train(1, "sharded_updates", {"whole": None}, IN_EVERY_WAY)[0]
    check_same(alone, train(2, "sharded_updates", {way: WAYS[way]}, IN_EVERY_WAY, timeout=120))
    plain = train(1, "sharded_updates", {"whole": None})[0]["plain", "whole"][0]
    for name in IN_EVERY_WAY:
        assert largest_difference(alone[name, "whole"][0], plain) > 10 * SAME, "a control: the option has an effect"


@pytest.mark.slow
def test_each_process_keeps_its_share():
    for shares, is_gathered in train(2, "kept_shares", Sharded()):
        assert all(0.45 < share < 0.55 for share in shares) and not is_gathered


@pytest.mark.slow
def test_a_run_is_the_same_sharded_or_not(tmp_path):
    """With different prompts in each process, a reference, and a checkpoint that is saved at the end."""
    ways = {"whole": None, "gathered": Sharded(), "lock-step": Sharded(gather=False)}
    whole, *others = [train(2, "run_between_checkpoints", tmp_path, 4, None, way, shard) for way, shard in ways.items()]
    for other in others:
        for (weights, _, figures, numbers, _), (theirs, _, their_figures, their_numbers, _) in zip(whole, other):
            assert largest_difference(weights, theirs) < SAME
            assert figures == pytest.approx(their_figures) and numbers == their_numbers
    for way in ways:
        assert (tmp_path / way / "shards").is_dir() == (way != "whole")


@pytest.mark.parametrize("way", seldom(["gathered", "lock-step", "offloaded"]))
def test_a_sharded_run_resumes_exactly(way, tmp_path):
    whole = train(2, "run_between_checkpoints", tmp_path, 4, None, None, WAYS[way])
    train(2, "run_between_checkpoints", tmp_path, 2, None, "half", WAYS[way])
    resumed = train(2, "run_between_checkpoints", tmp_path, 2, "half", None, WAYS[way])
    for (weights, _, figures, *_), (again, before, same, _, said) in zip(whole, resumed):
        assert largest_difference(weights, again) == 0 and figures == same and not said
        assert before["tokens"] == 96 and same["tokens"] == 192


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_another_number_of_processes(tmp_path):
    """2 -> 1 -> 4 processes, of which a single one writes no shards, and then unsharded again."""
    two = train(2, "run_between_checkpoints", tmp_path, 2, None, "two", Sharded())
    one = train(1, "run_between_checkpoints", tmp_path, 1, "two", "one", Sharded())
    four = train(4, "run_between_checkpoints", tmp_path, 1, "one", "four", Sharded())
    again = train(2, "run_between_checkpoints", tmp_path, 1, "four", None, None)
    for earlier, later in ((two, one), (one, four), (four, again)):
        for _, before, *_ in later:
            assert before == pytest.approx(earlier[0][2]), "as it was saved"
    assert (tmp_path / "four" / "shards").is_dir() and not (tmp_path / "one" / "shards").exists()


@pytest.mark.parametrize("way", seldom(["lock-step", "gathered"]))
def test_one_process_evaluates_and_shows_and_all_write(way, tmp_path):
    (tokens, rows, shown, evaluated, _), other = train(2, "logged_run", tmp_path, WAYS[way])
    assert other[0] == tokens == 2 * 48 + 4 and other[3] == evaluated == [0, 48, 96]
    assert "samples after 48 tokens" in shown and any("eval/reward" in row for _, row in rows)
    newest = max((tmp_path / "checkpoints").iterdir())
    model, _ = shared_agent()
    with pytest.warns(UserWarning, match="written by 2 processes and is loaded by 1"):
        load_checkpoint(model, newest)
    expected = model.policy.backbone.model.state_dict()
    for folder in (tmp_path / "model", tmp_path / "best" / "best" / "model"):
        exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(exported[name], weight) for name, weight in expected.items())


@pytest.mark.slow
def test_a_run_that_ends_after_an_update_is_measured_and_shown(tmp_path):
    whole, *others = (
        train(2, "measured_run", tmp_path / way, shard)
        for way, shard in {"whole": None, "gathered": Sharded(), "lock-step": Sharded(gather=False)}.items()
    )
    (history, n_shown, weights), _ = whole
    assert list(history) == [0, 48, 96] and n_shown == 3 and history[96]["kl"] > 0 == history[0]["kl"]
    for (theirs, their_n, their_weights), (_, nothing, _) in others:
        assert largest_difference(weights, their_weights) < SAME and (their_n, nothing) == (n_shown, 0)
        for at, figures in history.items():
            assert theirs[at] == pytest.approx(figures, abs=1e-5, nan_ok=True)


@pytest.mark.slow
def test_a_shard_that_cannot_be_written_is_an_error_of_storage_in_all(tmp_path):
    for number, text in train(2, "unwritable", tmp_path, Sharded()):
        assert number == errno.ENOSPC and "rank 1: [Errno 28] No space left" in text
    assert [path.name for path in tmp_path.iterdir()] == ["saved"] and verify_checkpoint(tmp_path / "saved") == 48


@pytest.mark.long
def test_files_of_shards_hold_what_is_not_elsewhere(tmp_path):
    """The shards of all processes, joined, are the weights of an unsharded run; nothing is pickled."""
    train(2, "run_between_checkpoints", tmp_path, 2, None, "two", Sharded())
    train(2, "run_between_checkpoints", tmp_path, 2, None, "whole")
    assert {path.suffix for path in (tmp_path / "two").rglob("*") if path.is_file()} == {".safetensors", ".json"}
    parts = [load_file(path) for path in sorted((tmp_path / "two" / "shards").iterdir())]
    for file in ("policy", "optimizer", "step_KLPenalty"):
        saved = load_file(tmp_path / "whole" / f"{file}.safetensors")
        left = load_file(tmp_path / "two" / f"{file}.safetensors")
        for name, tensor in saved.items():
            # A sharded tensor is split along its first axis, in rank order.
            pieces = [part[f"{file}/{name}"] for part in parts if f"{file}/{name}" in part]
            joined = left[name] if name in left else torch.cat(pieces)
            assert torch.allclose(joined, tensor, atol=SAME), name


ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}


def test_accelerate_asks_for_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert Sharded.asked_for() is None
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    assert Sharded.asked_for() == Sharded(offload=True)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        Sharded.asked_for()


@pytest.mark.slow
def test_what_accelerate_asks_for_is_done_and_one_process_has_none_of_it(tmp_path):
    pytest.importorskip("accelerate")
    done, _ = accelerate(tmp_path, "killed", "nowhere", options=["--use_fsdp", "--fsdp_version=2"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((max((tmp_path / "checkpoints").iterdir()) / "shards").iterdir())) == 2
    alone, sharded = (train(1, "sharded_updates", {"whole": shard})[0] for shard in (None, Sharded()))
    assert largest_difference(alone["plain", "whole"][0], sharded["plain", "whole"][0]) == 0


REFUSED = {
    "NLPO": (ValueError, "can be sharded, got top_p_lag"),
    "gathered encoder-decoder": (ValueError, "use gather=True"),
    "doctor": (ValueError, "examine it in one process"),
    "save": (RuntimeError, "use save_checkpoint and load_checkpoint"),
    "shard": (ValueError, r"got others in rank [01]: \['shard'\]"),
}


@pytest.mark.slow
def test_refusals():
    for results in train(2, "refusals", [*REFUSED, "nothing"]):
        assert results.pop("nothing") == "trained"
        for case, (error, words) in REFUSED.items():
            assert isinstance(results[case], error) and re.search(words, str(results[case])), results[case]


@pytest.mark.long
def test_torchrun_restarts_from_the_shards(tmp_path, monkeypatch):
    """Killed in an update: weights, within `SAME`, and token counts are those of an unsharded whole run."""
    whole = train(2, "killed", "nowhere", tmp_path / "whole")
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    done, seconds = torchrun(tmp_path, "killed", "update", options=["--max-restarts=1"])
    assert done.returncode == 0 and seconds < 60, done.stderr[-3000:]
    assert (max((tmp_path / "checkpoints").iterdir()) / "shards").is_dir()
    for rank, (weights, tokens, _) in enumerate(whole):
        again, same, resumed_at = pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes())
        assert largest_difference(weights, again) < SAME and tokens == same == 192 and resumed_at == 48


@pytest.mark.slow
def test_a_process_that_is_killed_in_lock_step_is_named(tmp_path):
    start = time.monotonic()
    first, second = launch(2, "killed", "rollout", tmp_path, 4, Sharded(gather=False))
    assert isinstance(second, ChildProcessError) and time.monotonic() - start < 60
    assert isinstance(first, ProcessLost) and "got no answer of rank 1" in str(first)
