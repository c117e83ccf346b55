"""The figures and warnings of a rollout whose episodes ended in several processes, in unequal numbers."""

import pytest

from agents.callbacks.training_warnings import RolloutFigures
from tests.helpers.processes import train


def test_figures_are_those_of_the_episodes_of_all():
    """By hand, of one and of three episodes and one that was dropped: means over processes would be others."""
    (alone,) = train(1, "figures_of_episodes")
    first, second = train(2, "figures_of_episodes")
    assert first == second == pytest.approx(alone)
    expected = {"episode/count": 4, "episode/reward_std": 1.0, "episode/dropped": 1, "episode/failed": 0}
    expected |= {"reward/task": 2.0, "reward/rule": 2.25, "reward/other": 0.75, "episode/end_length": 0.25}
    expected |= {"text/distinct": 0.75, "text/blank": 0.25, "prompt/largest_share": 0.75, "prompt/signal_share": 0.75}
    assert {name: alone[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rewards", "n_first", "is_warned"),
    [([0.5] * 32, 10, True), ([0.5] * 40 + [1.0], 40, False), ([0.5] * 31, 10, False)],
    ids=["equal in all", "equal in rank 0 alone", "too few"],
)
def test_warnings_look_at_the_episodes_of_all(rewards, n_first, is_warned):
    for warned in (
        train(1, "warnings_of_rewards", rewards, n_first),
        train(2, "warnings_of_rewards", rewards, n_first),
    ):
        assert all(
            [f"all {len(rewards)} last episodes earned 0.5" in text for text in said] == [True] * is_warned
            for said in warned
        )


def test_the_figures_of_processes_are_merged_by_hand():
    """The slowest reward, the mean divergence and entropy, and the largest ratio."""
    both = RolloutFigures(0.1, 9.0, 0.2, 0.5, 2.0), RolloutFigures(0.6, 3.0, 0.4, 0.1, 4.0)
    assert RolloutFigures.merged(both) == pytest.approx((0.6, 3.0, 0.3, 0.5, 3.0))
    assert RolloutFigures.merged([RolloutFigures(0.0, 0.0, None, 0.0, 1.0)] * 2).divergence is None
