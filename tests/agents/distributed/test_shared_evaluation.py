"""Evaluations of several processes: each runs its share of the episodes, and the figures are those of one process."""

import pytest

from agents import Sharded
from agents.distributed.collectives import ProcessStopped
from tests.agents.distributed.evaluation_jobs import MANY
from tests.helpers.models import seldom
from tests.helpers.processes import launch, train
from textenv.episodes.scores import RewardError

WAYS = {"gathered": Sharded(), "lock-step": Sharded(gather=False), "offloaded": Sharded(offload=True)}
SIZES = [(2, 2), pytest.param(3, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.long)]


@pytest.mark.parametrize(("size", "n"), SIZES)
def test_shared_texts_and_figures_are_those_of_one_process(size, n):
    """The slow way: one process that writes all texts itself, in `evaluate`."""
    ((n_texts, alone),) = train(1, "evaluated", MANY, n, None, False)
    assert n_texts == len(MANY) * n and {"kl", "judge", "reward/letters", "distinct_1"} <= alone["figures"].keys()
    assert len({text["text"] for text in alone["texts"]}) > n_texts // 2
    (own, first), *others = train(size, "evaluated", MANY, n)
    assert own == -(-n_texts // size) and sum(count for count, _ in others) == n_texts - own
    assert [result for _, result in others] == [None] * (size - 1)
    assert first == alone


@pytest.mark.slow
def test_fewer_texts_than_processes():
    results = train(3, "evaluated", ["ab"], 1)
    assert [count for count, _ in results] == [1, 0, 0]
    assert results[0][1] == train(1, "evaluated", ["ab"], 1, None, False)[0][1]


@pytest.mark.parametrize("way", seldom(["gathered", "lock-step", "offloaded"]))
def test_shards_are_evaluated_as_whole_weights_are(way):
    whole, sharded = (train(2, "evaluated", MANY, 1, shard, timeout=120) for shard in (None, WAYS[way]))
    assert [count for count, _ in sharded] == [7, 6]
    assert sharded[0][1] == whole[0][1]


def test_an_error_in_one_process_stops_the_others():
    """The error of the reward, and in the other process one that names it."""
    own, other = launch(2, "fails_in", 1)[::-1]
    assert isinstance(own, RewardError) and isinstance(other, ProcessStopped)
    assert "Rank 1 of 2 processes stopped" in str(other) and "no such word" in str(other)
