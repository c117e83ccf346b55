"""Engines in several processes: one in each or one for all; weights, texts, resuming, and an engine that ends."""

import pickle

import numpy as np
import pytest

from agents import EngineLost
from agents.distributed.hangs import ProcessLost
from tests.helpers.processes import launch, torchrun, train

CLOSE = 1e-5  # the largest difference of log-probabilities that caches and batches of another size may cause


def same_weights(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


def texts(rows):
    return np.array([actions for actions, *_ in rows])


def log_probs(rows):
    """Return the log-probabilities by the policy and by the model that sampled."""
    return np.array([row[1] for row in rows]), np.array([row[2] for row in rows])


def test_engines_write_what_the_policy_would_write_in_the_lanes_of_each_process():
    """Tokens depend on their row alone, so that engine and policy choose the same ones."""
    written, sampled = train(2, "chosen_by_row", True), train(2, "chosen_by_row", False)
    for (rows, weights), (own_rows, own_weights) in zip(written, sampled, strict=True):
        assert np.array_equal(texts(rows), texts(own_rows))
        ours, theirs = log_probs(rows)
        assert np.abs(ours - theirs).max() < CLOSE and np.abs(ours - log_probs(own_rows)[0]).max() < CLOSE
        assert max(np.abs(weights[name] - own_weights[name]).max() for name in weights) < CLOSE
    assert not np.array_equal(texts(written[0][0]), texts(written[1][0])), "each has prompts of its own"
    assert same_weights(written[0][1], written[1][1])


@pytest.mark.parametrize("when", ["writing", pytest.param("loading", marks=pytest.mark.slow)])
def test_an_engine_that_ends_in_one_process_ends_all_with_its_name(when):
    first, second = launch(2, "engine_of_rank_1_ends", when)
    said = "got its end, by signal 9" if when == "writing" else "Expected the weights of the engine's model"
    assert isinstance(second, EngineLost if when == "writing" else ValueError) and said in str(second)
    assert isinstance(first, ProcessLost) and str(first).startswith("Rank 1 of 2 processes stopped: ")
    assert said in str(first) and type(second).__name__ in str(first)


@pytest.mark.slow
def test_each_engine_gets_weights_once_per_update_and_writes_ahead():
    plain, ahead = train(2, "engine_in_each"), train(2, "engine_in_each", True)
    for (rows, weights, n_loads), (early_rows, _, n_early) in zip(plain, ahead, strict=True):
        assert n_loads == n_early == 4 and same_weights(weights, plain[0][1])
        ours, theirs = log_probs(rows)
        assert np.abs(ours - theirs).max() < CLOSE
        assert [row[3]["engine/age"] for row in rows] == [0] * 4
        ages = [row[3]["engine/age"] for row in early_rows]
        assert ages[0] == 0 and all(0 < age <= 1 for age in ages[1:])
        ours, theirs = log_probs(early_rows)
        assert np.abs(ours - theirs)[1:].max() > 1e-3, "older weights have written these"
    assert same_weights(ahead[0][1], ahead[1][1]) and not same_weights(ahead[0][1], plain[0][1])
    frozen = [train(2, "engine_in_each", early, 4, None, None, {"learning_rate": 0.0}) for early in (False, True)]
    for (rows, *_), (early_rows, *_) in zip(*frozen, strict=True):
        assert np.array_equal(texts(rows), texts(early_rows))


@pytest.mark.slow
def test_a_run_with_texts_ahead_resumes_exactly_and_without_them_on_another_number(tmp_path):
    whole = train(2, "engine_in_each", True, 4)
    train(2, "engine_in_each", True, 2, None, tmp_path / "half")
    resumed = train(2, "engine_in_each", True, 2, tmp_path / "half")
    for (rows, weights, _), (again, same, _) in zip(whole, resumed, strict=True):
        assert np.array_equal(texts(rows)[2:], texts(again)) and same_weights(weights, same)
        assert again[0][3]["engine/age"] > 0
    ((rows, *_),) = train(1, "engine_in_each", True, 2, tmp_path / "half")
    assert [row[3]["engine/age"] > 0 for row in rows] == [False, True], "the first rollout is written anew"


@pytest.mark.slow
def test_a_local_engine_in_each_process_or_for_all_writes_as_engines_inside_them(tmp_path):
    """Weights are sent once per update: by each process to its own engine, by rank 0 to the one that all share."""
    done, _ = torchrun(tmp_path, tmp_path, script="tests/agents/engines/launched.py")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in (0, 1))
    for name, ahead, n_loads in (("each", False, (4, 4)), ("shared", False, (4, 0)), ("ahead", True, (4, 0))):
        expected = train(2, "engine_in_each", ahead)
        for (rows, weights, _), result in zip(expected, (first[name], second[name]), strict=True):
            assert np.array_equal(texts(rows), texts(result[0])) and same_weights(weights, result[1]), name
        assert (first[name][2], second[name][2]) == n_loads, name
    (kind, said), (other_kind, quoted) = first["killed"], second["killed"]
    assert kind == "EngineLost" and "Expected an answer of the engine's process, got its end, by signal 9" in said
    assert other_kind == "ProcessStopped" and quoted == f"Rank 0 of 2 processes stopped: EngineLost: {said}"
    (kind, said), (other_kind, quoted) = first["refused"], second["refused"]
    assert kind == "TypeError" and other_kind == "ProcessStopped" and said in quoted
