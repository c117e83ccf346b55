"""Evaluation of a model of MaskablePPO: the functions of Stable-Baselines3 that ignore masks, and those that do not."""

import warnings

import pytest
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy

from agents import MaskableLMPolicy, TextVecEnv
from tests.helpers.training import TOKENIZER, tiny_agent, tiny_config, tiny_env
from textenv import AllowedMask

ALLOWED = [0, *TOKENIZER.encode("abc")]
WARNING = (
    r"Expected `action_masks` in `predict` of a model of MaskablePPO, got none: .*EvalCallback do not use the mask: "
    r"use evaluate_policy of sb3_contrib\.common\.maskable\.evaluation, or MaskableEvalCallback of sb3_contrib"
)


def forbidden(prompt, preds, done):
    """Reward a text with a token that the mask forbids."""
    return float(bool(set(preds.ids) - set(ALLOWED))) if done else 0.0


def masked_env():
    return tiny_env(reward=forbidden, mask=AllowedMask(ALLOWED))


def warnings_of(function):
    """Return the texts of a call's warnings, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return [str(warning.message) for warning in caught], result


@pytest.mark.parametrize("is_loaded", [False, True])
def test_plain_evaluate_policy_warns_once(tmp_path, is_loaded):
    """It writes forbidden tokens; sb3-contrib's writes none, and nothing warns."""
    model = tiny_agent(masked_env(), algorithm=MaskablePPO)
    if is_loaded:
        model.save(tmp_path / "agent.zip")
        model = MaskablePPO.load(tmp_path / "agent.zip", device="cpu")
    env = TextVecEnv(masked_env(), 3)
    said, (reward, _) = warnings_of(lambda: evaluate_masked(model, env, 9, deterministic=False))
    assert (said, reward) == ([], 0)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        reward, _ = evaluate_policy(model, env, 9, deterministic=False)
    assert reward > 0 and [warning.filename for warning in caught] == [__file__]
    said, _ = warnings_of(lambda: evaluate_policy(model, env, 9))
    assert said == []


@pytest.mark.parametrize(("callback", "n_warnings"), [(EvalCallback, 1), (MaskableEvalCallback, 0)])
def test_callbacks_warn_once_or_not_at_all(callback, n_warnings):
    model = tiny_agent(masked_env(), algorithm=MaskablePPO)
    evaluation = callback(TextVecEnv(masked_env(), 2), n_eval_episodes=4, eval_freq=4, verbose=0)
    said, _ = warnings_of(lambda: model.learn(48, callback=evaluation))
    assert sum("Expected `action_masks`" in text for text in said) == n_warnings


def test_an_env_without_a_mask_is_evaluated_without_warning():
    settings = {"n_steps": 4, "batch_size": 8, "device": "cpu", "policy_kwargs": {"lm": tiny_config()}}
    model = MaskablePPO(MaskableLMPolicy, TextVecEnv(tiny_env(), 2), **settings)
    model.learn(8, use_masking=False)
    said, _ = warnings_of(lambda: evaluate_policy(model, TextVecEnv(tiny_env(), 2), 2))
    assert said == []
