"""The division of sequences among minibatches: even sizes, each sequence once, samples of one prompt together (E4)."""

import numpy as np
import pytest

from agents import KLPenalty, RolloutStep
from agents.rollout import buffer
from agents.rollout.minibatches import UNEVEN, even_groups
from tests.helpers.training import tiny_agent, tiny_env


def epochs(counts, n_groups, members, n=20):
    rng = np.random.default_rng(0)
    return [even_groups(np.array(counts), n_groups, rng, members) for _ in range(n)]


def n_prompts(groups, members):
    """Return how many prompts the groups read, each once in each group that has it."""
    return sum(len(np.unique(members[group])) for group in groups)


@pytest.mark.parametrize("n_groups", [1, 2, 3, 4, 8, 40])
@pytest.mark.parametrize("samples", [1, 4, 5])
def test_e4_each_sequence_once_in_even_sizes_and_a_new_order(n_groups, samples):
    rng = np.random.default_rng(1)
    members = np.repeat(rng.permutation(12), samples)
    counts = rng.integers(20, 28, size=len(members))
    divisions = epochs(counts, n_groups, members)
    for groups in divisions:
        assert len(groups) == n_groups
        assert sorted(np.concatenate(groups)) == list(range(len(members)))
        if n_groups <= len(members):
            sizes = np.array([counts[group].sum() for group in groups])
            # At worst as uneven as single sequences make it.
            assert abs(sizes - sizes.mean()).max() <= max(UNEVEN * sizes.mean(), counts.max())
    if n_groups > 1:
        assert len({tuple(tuple(sorted(group)) for group in groups) for groups in divisions}) > 15


@pytest.mark.filterwarnings("error")
def test_without_a_whole_group_there_are_no_minibatches():
    rng, none = np.random.default_rng(0), np.zeros(0, dtype=np.int64)
    assert even_groups(none, 0, rng, none) == even_groups(none, 0, rng) == []
    assert rng.random() == np.random.default_rng(0).random(), "nothing is drawn"


def test_samples_of_one_prompt_stay_together():
    members = np.repeat(np.arange(8), 4)
    for groups in epochs([24] * 32, 4, members):
        assert n_prompts(groups, members) == 8  # each prompt in one group only
        assert [len(group) for group in groups] == [8] * 4
    apart = epochs([24] * 32, 4, None)
    assert min(n_prompts(groups, members) for groups in apart) > 16


def test_prompts_that_do_not_divide_evenly_are_divided_by_hand():
    """Six prompts in four groups: halves, three to a group, which are others in each epoch."""
    members = np.repeat(np.arange(6), 4)
    divisions = epochs([10] * 24, 4, members)
    for groups in divisions:
        assert [len(group) for group in groups] == [6] * 4
        assert n_prompts(groups, members) <= 12
    assert len({tuple(sorted(map(tuple, map(sorted, groups)))) for groups in divisions}) > 15


def test_one_prompt_to_a_group_in_a_new_order():
    members = np.repeat(np.arange(4), 4)
    orders = [[set(members[group]) for group in groups] for groups in epochs([10] * 16, 4, members)]
    assert all(sorted(order, key=min) == [{0}, {1}, {2}, {3}] for order in orders)
    assert len({tuple(map(min, order)) for order in orders}) > 10


def test_the_buffer_keeps_groups_of_samples_together():
    env = tiny_env(samples_per_prompt=4, stop_ids=())
    model = tiny_agent(env, n_envs=32, batch_size=64)
    model.learn(128)
    minibatches = list(model.rollout_buffer.get(64))
    assert len(minibatches) == 2
    members = model.rollout_buffer.trained.members
    assert sorted(np.unique(members, return_counts=True)[1]) == [4] * 8
    for samples in minibatches:  # of 4 groups whose prompts may be equal
        batch = samples.observations
        assert len(batch.lengths) == 16 and len(np.unique(batch.prompts)) <= 4


def test_the_view_is_built_once_while_steps_run(monkeypatch):
    calls, seen = [], []
    batch_of = buffer.batch_of
    monkeypatch.setattr(buffer, "batch_of", lambda *args: calls.append(1) or batch_of(*args))

    class Look(RolloutStep):
        key = "Look"

        def __call__(self, rollout):
            seen.append(rollout.view())

    model = tiny_agent()
    model.learn(16, callback=[Look(), KLPenalty(0.1)])
    assert len(seen) == 1 and len(calls) == 1 + 2  # the view, and a minibatch in each of two epochs
    assert model.rollout_buffer._view is None and model.rollout_buffer.view() is not seen[0]
