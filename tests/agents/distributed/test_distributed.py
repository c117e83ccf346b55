"""Training in several processes: the update of one process, shared figures, checkpoints, refusals, lost processes."""

import pickle
import re
import time
from functools import cache

import numpy as np
import pytest
import torch

from agents import GSPO, ClipHigher, DataParallel, Sharded
from agents.distributed.collectives import ProcessLost
from agents.distributed.world import world
from tests.helpers.models import seldom
from tests.helpers.processes import free_port, launch, torchrun, train
from tests.helpers.training import tiny_agent

SAME = 1e-6  # the largest difference of weights that sums in another order may cause
OTHERS = ("advantages", "returns", "scores", "divergence")  # exchanges that `jobs.switch_off` can disable


def largest_difference(first, second):
    return max(np.abs(first[name] - second[name]).max() for name in first)


@cache
def alone(n_minibatches):
    """Return the weights and figures after three updates in one process."""
    return train(1, "scripted_updates", n_minibatches)[0]


@pytest.mark.parametrize(
    ("size", "n_minibatches"),
    [pytest.param(2, 1, marks=pytest.mark.long), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_the_update_is_that_of_one_process_on_the_union_of_the_data(size, n_minibatches):
    weights, figures = alone(n_minibatches)
    results = train(size, "scripted_updates", n_minibatches)
    for theirs, their_figures in results:
        assert largest_difference(theirs, weights) < SAME
        assert their_figures == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize("off", ["weights", *seldom(OTHERS, 1)])
def test_without_an_exchange_the_update_differs(off):
    weights, _ = alone(2)
    (theirs, _), (others, _) = train(2, "scripted_updates", 2, off)
    assert max(largest_difference(theirs, weights), largest_difference(others, weights)) > 10 * SAME


@pytest.mark.slow
def test_the_update_is_the_same_with_every_option():
    alone, (first, second) = train(1, "every_option")[0], train(2, "every_option", timeout=120)
    assert len(alone) > 10
    for option, (weights, figures) in alone.items():
        tolerance = 1e-3 if option == "bfloat16" else SAME
        for theirs, their_figures in (first[option], second[option]):
            assert largest_difference(theirs, weights) < tolerance, option
            assert their_figures == pytest.approx(figures, rel=1e-2 if option == "bfloat16" else 1e-4), option
    assert 3 < alone["target_kl"][1]["updates"] < 12, "some updates were broken off"
    assert [name for name, (_, figures) in alone.items() if figures["shares"]] == ["shared prompts"]


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_exactly(tmp_path):
    whole = train(2, "run_between_checkpoints", tmp_path, 4)
    train(2, "run_between_checkpoints", tmp_path, 2, None, "half")
    resumed = train(2, "run_between_checkpoints", tmp_path, 2, "half")
    for (weights, _, figures, *_), (again, before, same, _, said) in zip(whole, resumed):
        assert largest_difference(weights, again) == 0 and figures == same and not said
        assert before["tokens"] == 96 and same["tokens"] == 192, "of both processes"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """2 -> 1 -> 2: weights, coefficient and counts are kept, no prompt repeats, and a warning names what is lost."""
    two = train(2, "run_between_checkpoints", tmp_path, 2, None, "two")
    one = train(1, "run_between_checkpoints", tmp_path, 1, "two", "one")
    again = train(2, "run_between_checkpoints", tmp_path, 1, "one")
    for earlier, later in ((two, one), (one, again)):
        for _, before, *_ in later:
            assert before == earlier[0][2], "as it was saved"
    numbers = [number for part in (two, one, again) for *_, dealt, _ in part for number in dealt]
    assert len(numbers) == len(set(numbers)) > 30, "no prompt twice in an epoch"
    said = [text for part in (two, one, again) for *_, texts in part for text in texts]
    assert len(said) == 2, "by rank 0, when the number changes"
    assert "written by 2 processes and is loaded by 1" in said[0] and "8 running episodes" in said[0]
    assert "written by 1 processes and is loaded by 2" in said[1]


@pytest.mark.slow
def test_one_process_logs_evaluates_and_writes_for_all(tmp_path):
    (tokens, rows, shown, evaluated, numbers), other = train(2, "logged_run", tmp_path)
    # Both stop after two evaluations without a better figure, in the first step of the next rollout.
    assert other[0] == tokens == 2 * 48 + 4 and other[3] == evaluated == [0, 48, 96]
    assert other[1] == [] and other[2] == "" and "samples after 48 tokens" in shown
    assert not set(numbers) & set(other[4]), "no prompt in both"
    logged = {key: value for _, row in rows for key, value in row.items()}
    assert logged["own/rank"] == 0.5 and logged["own/last"] == 7 and logged["groups/dropped"] == 3
    assert logged["time/total_timesteps"] == 96 and "eval/reward" in logged
    each = [logged[f"time/rollout_seconds/rank_{rank}"] for rank in (0, 1)]
    assert logged["time/rollout_seconds"] == max(each) and min(each) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"best", "checkpoints", "curves.png", "model"}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2 and (tmp_path / "model" / "config.json").is_file()


def test_without_a_seed_weights_and_order_are_shared_and_samples_are_not():
    one, other = train(2, "unseeded")
    assert one[0] == other[0] and not set(one[1]) & set(other[1]) and one[2] != other[2]


@pytest.mark.parametrize(("lengths", "theirs"), [((2, 4), (2, 2)), ((4, 4), None)])
@pytest.mark.filterwarnings("ignore:No group of 4 samples is whole")
def test_a_process_without_a_whole_group_takes_part_and_adds_nothing(lengths, theirs):
    """A process's 2 lanes end a group of 4 texts of 2 tokens in a rollout, but half a group of texts of 4 tokens."""
    first, second = train(2, "groups_of_lengths", lengths, 4)
    assert largest_difference(first, second) == 0
    expected = train(1, "groups_of_lengths", theirs, 2)[0] if theirs else {name: 0 for name in first}
    assert largest_difference(first, expected) < (SAME if theirs else 1e-30)
    assert theirs is None or max(np.abs(change).max() for change in first.values()) > 100 * SAME


@pytest.mark.parametrize(("min_groups", "max_rollouts"), [(3, 99), (99, 4)])
def test_d11_the_processes_decide_together_when_groups_that_wait_are_trained(min_groups, max_rollouts):
    """Only the groups of rank 0 have a signal; rank 1, which trains none, takes part in each update."""
    first, second = train(2, "waiting_groups", min_groups, max_rollouts, 12)
    assert [row[2] for row in first] == [row[2] for row in second], "the same weights"
    assert all((trained, waiting) == (0, 0) for trained, waiting, _ in second)
    updates = [i for i, (trained, *_) in enumerate(first) if trained]
    expected = [i for i, (trained, waiting, _) in enumerate(first) if (trained + waiting) / 2 >= min_groups]
    assert updates == (expected if min_groups == 3 else [3, 7, 11]) and len(updates) > 1
    changed = [i for i in range(11) if first[i][2] != first[i + 1][2]]
    assert changed == [i for i in updates if i < 11]


@pytest.mark.slow
def test_the_update_is_the_same_with_every_advantage():
    alone, both = train(1, "every_advantage")[0], train(2, "every_advantage", timeout=120)
    for name, (weights, figures) in alone.items():
        for results in both:
            assert largest_difference(results[name][0], weights) < SAME, name
            assert results[name][1] == pytest.approx(figures, rel=1e-4), name
    names = list(alone)
    pairs = [(first, second) for i, first in enumerate(names) for second in names[:i]]
    apart = [largest_difference(alone[first][0], alone[second][0]) for first, second in pairs]
    assert min(apart) > 100 * SAME, "no two of them are the same"
    (theirs, _), _ = train(2, "one_advantage", "reinforce++", "advantages")
    assert largest_difference(theirs, alone["reinforce++"][0]) > 10 * SAME, "a control: normalised in each process"


REFUSED = {
    "lanes": (ValueError, "Expected n_envs to divide by the 2 processes, got 3"),
    "batch": (ValueError, "Expected `batch_size` to divide n_steps \\* n_envs = 16, got 10"),
    "normalize_advantage": (ValueError, "Expected normalize_advantage=False of the algorithm"),
    "settings": (ValueError, r"Expected the same settings in all processes, got others in rank [01]: \['n_epochs'\]"),
    "critic_lambda": (ValueError, r"same settings in all processes, got others in rank [01]: \['critic_lambda'\]"),
    "TRPO": (ValueError, "Expected one process for FlatLMPolicy, got several"),
    "alone": (RuntimeError, "Expected all processes at the same, got rank . at '(saving|training)' and rank"),
    "by hand": (RuntimeError, r"Expected the callback DataParallel\(\)"),
}


def test_refusals_and_an_algorithm_built_by_hand():
    """All processes get the refusal, and can train together afterwards."""
    for results in train(2, "refusals", [*REFUSED, "nothing"]):
        assert results.pop("nothing") == "trained"
        for case, (error, words) in REFUSED.items():
            assert isinstance(results[case], error) and re.search(words, str(results[case])), results[case]


def test_an_error_in_one_process_ends_the_others():
    first, second = launch(2, "refused", "reward", timeout=30)
    assert "the scorer is gone" in str(second)
    assert isinstance(first, ProcessLost) and "rank 1" in str(first)


def test_a_process_group_of_the_scripts_own_is_used():
    assert train(2, "join_as_initialised") == [([0, 1], 0)] * 2


def test_the_process_that_serves_the_others_leaves_last():
    first, second = train(2, "leave_late", 0.5)
    assert first > second


def test_one_process_has_nothing_of_it(monkeypatch):
    """A single process makes no process group, no shared gradient and no rollout step."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = tiny_agent()
    model.learn(16, callback=DataParallel())
    assert world() is None and not torch.distributed.is_initialized() and model.policy.shared is None
    assert model.rollout_buffer.before_returns == [] and next(model.rollout_buffer.get()).observations.share is None


@pytest.mark.slow
def test_processes_that_were_started_wrongly_are_told():
    ok = launch(2, "join", 20)
    assert [joined[:2] for joined in ok] == [(0, 2), (1, 2)] and ok[0][2] == ok[1][2]
    sizes = {0: {"WORLD_SIZE": "3"}}
    for result in launch(2, "join", 20, environments=sizes):
        assert isinstance(result, ValueError) and "has WORLD_SIZE=" in str(result)
    for result in launch(2, "join", 1, environments={rank: {"WORLD_SIZE": "3"} for rank in (0, 1)}):
        assert isinstance(result, TimeoutError) and "got none of rank [2]" in str(result)
    result = launch(1, "join", 1, environments={0: {"WORLD_SIZE": "2"}})[0]
    assert isinstance(result, ValueError) and "variable RANK to be a number" in str(result)
    alone = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = launch(1, "join", 1, environments={0: alone})[0]
    assert isinstance(result, TimeoutError) and "an answer of rank 0 at 127.0.0.1" in str(result)


@pytest.mark.slow
def test_a_process_that_is_killed_in_a_rollout_is_named(tmp_path):
    start = time.monotonic()
    first, second = launch(2, "killed", "rollout", tmp_path)
    assert isinstance(second, ChildProcessError) and time.monotonic() - start < 60
    assert isinstance(first, ProcessLost) and "got no answer of rank 1" in str(first)


@pytest.mark.slow
def test_doctor_warnings_nlpo_and_a_separate_critic_work_in_several_processes():
    """Weights and counts are shared, and so is the table of prompts."""
    (weights, tokens, drawn), other = train(2, "extras_together")
    assert other == (weights, tokens, drawn) and tokens == 96 and sum(drawn) > 12


@pytest.mark.slow
def test_two_processes_learn_as_one_does():
    ((first, last),) = train(1, "learn_a", 1e-2)
    (ours, learnt), _ = train(2, "learn_a", 1e-2)
    assert first < 0.1 and ours < 0.1 and last > 0.8 and learnt > 0.8
    (before, after), _ = train(2, "learn_a", 0.0)
    assert abs(after - before) < 0.1, "the negative control"


@pytest.mark.slow
def test_torchrun_ends_all_within_a_minute_and_names_the_one_that_was_killed(tmp_path):
    done, seconds = torchrun(tmp_path, "killed", "rollout")
    assert done.returncode != 0 and seconds < 60
    assert re.search(r"rank\s*: 1", done.stderr) and "exitcode  : -9" in done.stderr


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path):
    """Killed in an update, after rank 0 has counted its tokens: weights and token counts are those of a whole run."""
    whole = train(2, "killed", "nowhere", tmp_path / "whole")
    done, _ = torchrun(tmp_path, "killed", "update", options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, (weights, tokens, _) in enumerate(whole):
        again, same, resumed_at = pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes())
        assert largest_difference(weights, again) == 0 and tokens == same == 192 and resumed_at == 48


@pytest.mark.parametrize(
    ("surrogate", "aggregation"),
    [(GSPO(1e-3, 2e-3), "sequence"), pytest.param(ClipHigher(), "constant", marks=pytest.mark.slow)],
)
def test_e13_aggregations_count_the_sequences_of_all_processes(surrogate, aggregation):
    weights = train(1, "surrogate_update", surrogate, aggregation)[0]
    for theirs in train(2, "surrogate_update", surrogate, aggregation):
        assert largest_difference(theirs, weights) < SAME
    other = train(2, "surrogate_update", surrogate, aggregation, True)[0]
    assert largest_difference(other, weights) > 10 * SAME, "a negative control: counts of one process"


def test_two_processes_log_the_explained_variance_of_one():
    (one,) = train(1, "explained_thirds")
    first, second = train(2, "explained_thirds")
    assert len(one) == 2 and all(len(row) == 3 for row in one)
    for ours, theirs, row in zip(first, second, one):
        assert ours == theirs and ours == pytest.approx(row, rel=1e-4, abs=1e-6), "shares of a variance: of 0 to 1"


@pytest.mark.parametrize(
    ("estimator", "shard"),
    [("k2", None), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (("exact", None), ("k2", Sharded())))],
)
def test_e14_kl_in_the_loss_is_a_mean_over_all_processes(estimator, shard):
    weights = train(1, "surrogate_update", None, "sequence", False, estimator)[0]
    for theirs in train(2, "surrogate_update", None, "sequence", False, estimator, shard):
        assert largest_difference(theirs, weights) < SAME
    without = train(1, "surrogate_update", None, "sequence")[0]
    assert largest_difference(without, weights) > 10 * SAME
    if shard is not None:
        with pytest.raises(ValueError, match="Expected estimator='k2' of KLPenalty in the loss with sharded weights"):
            train(2, "surrogate_update", None, "sequence", False, "exact", shard)
