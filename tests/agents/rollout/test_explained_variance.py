"""The explained variance of values by thirds of the text: by hand, as SB3 computes it, and in real rollouts."""

import math

import numpy as np
import pytest
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import explained_variance as of_sb3

from agents import EpisodeMetrics, SampleGroups
from agents.rollout.explained_variance import THIRDS, by_third, explained_variance, thirds
from tests.helpers.training import Recorder, tiny_agent, tiny_env
from tests.helpers.value_jobs import Thirds


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [1]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 1, 2]), (5, [0, 0, 1, 2, 2]), (6, [0, 0, 1, 1, 2, 2])],
)
def test_texts_of_any_length_are_cut_alike_at_both_ends(n, expected):
    assert thirds(np.arange(7, 7 + n), n_prompt=8).tolist() == expected


def test_replies_count_and_the_earlier_part_of_a_text_may_be_missing():
    # Behind a prompt of 2: two tokens, a reply of three, a token; and a text whose first four tokens came earlier.
    assert thirds(np.array([1, 2, 6]), n_prompt=2).tolist() == [0, 0, 2]
    assert thirds(np.array([5, 6]), n_prompt=2).tolist() == [2, 2]


def test_by_hand():
    """Two texts of three tokens: values that are the returns, that are half of them, and that vary against them."""
    places = np.array([0, 1, 2])
    texts = [(np.array([1.0, 1.0, 3.0]), np.array([1.0, 2.0, 0.0]), places)]
    texts += [(np.array([5.0, 3.0, 0.0]), np.array([5.0, 6.0, 3.0]), places)]
    # The middle: returns 2 and 6, variance 4; errors 1 and 3, variance 1. The last: variance 2.25; errors -3 and 3: 9.
    assert by_third(texts) == {"first": 1.0, "middle": 1 - 1 / 4, "last": 1 - 9 / 2.25}


def test_it_is_sb3s_and_says_nothing_of_no_tokens():
    rng = np.random.default_rng(0)
    values, returns = rng.normal(size=(2, 50))
    assert explained_variance(values, returns) == pytest.approx(of_sb3(values, returns))
    assert math.isnan(explained_variance(values, np.full(50, 0.25))) and math.isnan(of_sb3(values, np.full(50, 0.25)))
    assert explained_variance(values[:0], returns[:0]) is None and by_third([]) == {}


class KnowsOnly(BaseCallback):
    """Replaces values: those of the last token of each text are its return, and all others a number of their own."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        buffer.values[:] = np.random.default_rng(0).normal(size=buffer.values.shape)
        for segment in buffer.segments:
            buffer.values[segment.end - 1, segment.lane] = buffer.returns[segment.end - 1, segment.lane]


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_a_critic_that_knows_only_the_ends_shows_it(algorithm):
    logged = Thirds()
    model = tiny_agent(tiny_env(stop_ids=(), max_new_tokens=3), n_envs=32, algorithm=algorithm)
    model.learn(96, callback=[KnowsOnly(), EpisodeMetrics(), logged])
    assert logged.rows[0]["last"] == 1.0 and max(logged.rows[0][third] for third in ("first", "middle")) < 0.5


class Slow(Recorder):
    """Keeps values and returns, too, and the indices of the episodes that ended in each rollout."""

    def _on_training_start(self):
        super()._on_training_start()
        self.values, self.returns = [], []

    def _on_rollout_end(self):
        self.values.append(self.model.rollout_buffer.values.copy())
        self.returns.append(self.model.rollout_buffer.returns.copy())


def test_in_rollouts_that_cut_texts_it_is_the_plain_calculation_over_ended_texts():
    slow, logged = Slow(), Thirds()
    model = tiny_agent(tiny_env(max_new_tokens=5, stop_strings=["z", "k", "q"]), n_envs=16, n_steps=4)
    model.learn(3 * 64, callback=[slow, EpisodeMetrics(), logged])
    values, returns = slow.stacked("values"), slow.stacked("returns")
    for rollout in range(3):
        kept = {third: [] for third in range(3)}
        for _, steps in slow.episodes():
            own = [(step, lane) for step, lane in steps if step // 4 == rollout]
            if steps[-1][0] // 4 == rollout:  # it ended in this rollout
                for step, lane in own:
                    i = step - steps[0][0]
                    kept[int(3 * (i + 0.5) / len(steps))].append((values[step, lane], returns[step, lane]))
        expected = {name: of_sb3(*np.array(kept[third]).T) for third, name in enumerate(THIRDS) if kept[third]}
        assert logged.rows[rollout] == pytest.approx(expected, rel=1e-4)


def test_a_rollout_that_trains_nothing_logs_nothing():
    logged, env = Thirds(), tiny_env(lambda prompt, preds, done: 0.0, samples_per_prompt=2, stop_ids=())
    model = tiny_agent(env, 8, rollout_buffer_kwargs={"advantage": "grpo"})
    with pytest.warns(UserWarning, match="No group"):
        model.learn(32, callback=[SampleGroups(1, 1), EpisodeMetrics(), logged])
    assert logged.rows == [{}]
