"""Wrappers around the env of an algorithm: those that change observations are refused by name, others are not."""

import re

import numpy as np
import pytest
from gymnasium import wrappers
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from agents import LMPolicy, SequenceRolloutBuffer, TextVecEnv
from tests.helpers.models import make_ppo, tiny
from tests.helpers.training import tiny_env


def agent(env, buffer=SequenceRolloutBuffer):
    settings = {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "normalize_advantage": False, "device": "cpu"}
    return PPO(LMPolicy, env, rollout_buffer_class=buffer, policy_kwargs={"lm": tiny()}, **settings)


def lanes():
    return TextVecEnv(tiny_env(), 2)


def each(wrap):
    """Return a `DummyVecEnv` of two envs inside wrappers of gymnasium."""
    return DummyVecEnv([lambda: wrap(tiny_env())] * 2)


class Changed(VecEnvWrapper):
    """A wrapper of the user's own, which keeps the space: rows in reverse."""

    def reset(self):
        return self.venv.reset()[:, ::-1].copy()

    def step_wait(self):
        observations, *rest = self.venv.step_wait()
        return (observations[:, ::-1].copy(), *rest)


@pytest.mark.parametrize("buffer", [SequenceRolloutBuffer, RolloutBuffer])
@pytest.mark.parametrize("outside", [lambda env: env, VecMonitor], ids=["alone", "inside VecMonitor"])
def test_stacked_frames_are_refused_as_the_agent_is_built(buffer, outside):
    """A prompt of 4 tokens at most, the separator and 4 new tokens are 9 columns; two of them 18."""
    words = (
        "Expected the observations of the env inside VecFrameStack, Box(-2, 32, (9,), int64), got Box(-2, 32, (18,), "
        "int64): a language model would read them as a text of their own. Leave VecFrameStack out"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        agent(outside(VecFrameStack(lanes(), 2)), buffer)
    with pytest.raises(ValueError, match="Leave VecFrameStack out"):  # not: longer than the model's positions
        agent(outside(VecFrameStack(lanes(), 100)), buffer)


NO_ROWS = {
    "FrameStackObservation": lambda env: wrappers.FrameStackObservation(env, 2),
    "DtypeObservation": lambda env: wrappers.DtypeObservation(env, np.float32),
    "NormalizeObservation": wrappers.NormalizeObservation,
    "TimeAwareObservation": lambda env: wrappers.TimeAwareObservation(wrappers.TimeLimit(env, 9), flatten=False),
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_spaces_without_a_row_of_tokens_are_refused_as_the_agent_is_built(name):
    words = rf"Expected observations of token ids, \(L,\), as a TextEnv returns them, got .* from .*VecEnv<.*{name}<"
    with pytest.raises(ValueError, match=words):
        agent(each(NO_ROWS[name]))


OTHER_ROWS = {
    "Changed<TextVecEnv<TextEnv instance>>": lambda: Changed(lanes()),
    "DummyVecEnv<DelayObservation<TextEnv instance>>": lambda: each(lambda env: wrappers.DelayObservation(env, 1)),
    "DummyVecEnv<FlattenObservation<FrameStackObservation<TextEnv instance>>>": lambda: each(
        lambda env: wrappers.FlattenObservation(wrappers.FrameStackObservation(env, 2))
    ),
    "DummyVecEnv<TransformObservation<TextEnv instance>>": lambda: each(
        lambda env: wrappers.TransformObservation(env, lambda row: row + 1, env.observation_space)
    ),
}


@pytest.mark.parametrize("buffer", [SequenceRolloutBuffer, RolloutBuffer])
@pytest.mark.parametrize("names", OTHER_ROWS)
def test_rows_that_are_no_text_are_refused_as_a_rollout_begins(names, buffer):
    words = rf"a TextEnv returns them \(a prompt, -2, later tokens, then -1\), got \[.*\] in row 0 from {names}: leave"
    with pytest.raises(ValueError, match=words):
        agent(OTHER_ROWS[names](), buffer).learn(16)


def test_a_wrapper_that_set_env_brings_is_refused():
    model = make_ppo()
    model.learn(48)
    inner = model.get_env()
    model.set_env(Changed(inner))
    with pytest.raises(ValueError, match=r"Changed<TextVecEnv<TextEnv instance>>: leave out the wrapper"):
        model.learn(48)
    model.set_env(inner)
    model.learn(48)


HARMLESS = {
    "VecMonitor": lambda: VecMonitor(lanes()),
    "VecCheckNan": lambda: VecCheckNan(lanes()),
    "VecNormalize of rewards": lambda: VecNormalize(lanes(), norm_obs=False),
    "VecFrameStack of one": lambda: VecFrameStack(lanes(), 1),
    "Monitor, TimeLimit": lambda: each(lambda env: Monitor(wrappers.TimeLimit(env, 3))),
    "FlattenObservation of a row": lambda: each(wrappers.FlattenObservation),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_other_wrappers_train(name):
    model = agent(HARMLESS[name]())
    model.learn(32)
    assert model._n_updates == 2


def test_predict_looks_at_no_env(tmp_path):
    """A loaded model without an env, or one whose training env is wrapped, predicts for the env of an evaluation."""
    model = make_ppo()
    model.save(tmp_path / "agent.zip")
    evaluate_policy(PPO.load(tmp_path / "agent.zip", device="cpu"), lanes(), 2)
    model.learn(48)
    model.set_env(Changed(model.get_env()))
    evaluate_policy(model, lanes(), 2)
