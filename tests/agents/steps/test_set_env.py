"""Another env by `set_env` between two calls of `learn`: the steps follow it, or refuse it."""

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecNormalize

from agents import RewardShaping, TextVecEnv
from tests.helpers.training import Recorder, tiny_agent, tiny_env
from textenv.rewards import DROPPED, BatchReward

OTHERS = ("xyz", "a")  # the prompts of the new env


class Scorer(BatchReward):
    """The length and first token of a text; keeps the prompts of each call, and may drop the prompt "a"."""

    may_drop = True

    def __init__(self, drops=False):
        self.calls, self.drops = [], drops

    def score(self, prompts, preds, dones):
        self.calls.append([str(prompt) for prompt in prompts])
        rows = zip(prompts, preds, strict=True)
        return [DROPPED if self.drops and prompt == "a" else value(text.ids) for prompt, text in rows]


def value(ids):
    return 0.1 * len(ids) + ids[0] / 10


def given(model, **kwargs):
    """Give a model an env of other prompts, and return the env."""
    env = tiny_env(prompts=OTHERS, max_new_tokens=6, **kwargs)
    model.set_env(TextVecEnv(env, 4))
    return env


def agent(**kwargs):
    env = {name: kwargs.pop(name) for name in ("reward", "score_at", "samples_per_prompt") if name in kwargs}
    model = tiny_agent(tiny_env(prompts=("ab", "cde"), max_new_tokens=6, **env), **kwargs)
    model.learn(24)
    return model


def test_late_scores_come_from_the_new_env():
    first, second, recorder = Scorer(), Scorer(), Recorder()
    model = agent(reward=first, score_at="rollout_end")
    n_calls = len(first.calls)
    given(model, reward=second, score_at="rollout_end")
    model.learn(72, callback=recorder)
    assert len(first.calls) == n_calls and len(second.calls) == 3  # one call a rollout
    expected = np.zeros((18, 4))
    for _, positions in recorder.episodes():
        expected[positions[-1]] = value([int(recorder.actions[step][lane]) for step, lane in positions])
    np.testing.assert_allclose(recorder.stacked("rewards"), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
def test_groups_are_those_of_the_new_env():
    """Of two samples, the advantage by RLOO is the one's reward less the other's."""
    model = agent(samples_per_prompt=2, vf_coef=0.0, rollout_buffer_kwargs={"advantage": "rloo"})
    given(model, samples_per_prompt=2, reward=lambda prompt, text, done: value(text.ids) if done else 0.0, stop_ids=())
    recorder = Recorder()
    model.learn(24, callback=recorder)
    buffer, rewards = model.rollout_buffer, recorder.rewards[0][-1]  # (B,): all texts end at the last of 6 tokens
    assert len(buffer.trained) == 4 and len(set(rewards)) > 1
    first, second, third, fourth = (float(reward) for reward in rewards)
    by_hand = [first - second, second - first, third - fourth, fourth - third]
    for part, advantage in zip(buffer.trained, by_hand, strict=True):
        np.testing.assert_allclose(part.advantages, [advantage] * 6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
def test_episodes_of_the_old_env_are_forgotten():
    """A group of the old env waits with one of its members; the new env has groups of the same numbers."""
    model = agent(samples_per_prompt=3, n_steps=6, rollout_buffer_kwargs={"advantage": "rloo"})
    assert model.rollout_buffer.waiting_episodes
    given(model, samples_per_prompt=3)
    recorder = Recorder()
    model.learn(24 * 3, callback=recorder)
    ended = [(positions[-1], info["group"]) for info, positions in recorder.episodes()]
    assert set(model.rollout_buffer.waiting_episodes) <= {place for place, _ in ended}


def test_the_new_env_may_drop_episodes():
    model, scorer = agent(reward=Scorer(drops=True)), Scorer(drops=True)
    given(model, reward=scorer, stop_ids=())
    model.learn(24)
    lost = [prompt == "a" for call in scorer.calls for prompt in call]
    assert 0 < sum(lost) < len(lost) == 4
    assert model.rollout_buffer.dropped == {(5, lane) for lane, is_lost in enumerate(lost) if is_lost}


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
def test_an_env_that_a_step_cannot_work_with_is_refused():
    model = agent(samples_per_prompt=2)
    before = model.get_env()
    given(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="Expected samples_per_prompt of 2 or more in the env, got 1"):
            model.learn(24)
    model.set_env(before)
    model.learn(24)
    late = agent(reward=Scorer(), score_at="rollout_end")
    given(late, reward=Scorer())
    with pytest.raises(ValueError, match="Expected an env with score_at='rollout_end', got 'done'"):
        late.learn(24)


def test_a_wrapper_around_the_same_env_is_looked_at_too():
    model = agent(reward=Scorer())
    model.learn(24, callback=RewardShaping(scale=True))
    model.set_env(VecNormalize(model.get_env(), norm_obs=False))
    with pytest.raises(ValueError, match="Expected VecNormalize with norm_reward=False, got True"):
        model.learn(24)
