"""State of callbacks in checkpoints: a resumed run warns and logs as one that was never stopped."""

import warnings

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import EpisodeMetrics, TrainingWarnings, load_checkpoint, save_checkpoint
from tests.agents.callbacks.test_training_warnings import LoggedKL
from tests.helpers.models import tiny
from tests.helpers.training import tiny_agent, tiny_env
from textenv import RewardError

N_ENVS = 8
ROLLOUT = N_ENVS * 4
ROLLOUTS = 6
pytestmark = pytest.mark.filterwarnings("ignore:.*(fewer than 4 in each|such rows)")


class Sharpen(BaseCallback):
    """Sharpens the policy after two rollouts, so that it writes the same text again and again."""

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.model.num_timesteps == 2 * ROLLOUT:
            with torch.no_grad():
                self.model.policy.lm.backbone.model.transformer.ln_f.weight.mul_(30.0)


def divergences(done):
    return [LoggedKL([-0.1] * (ROLLOUTS - done))]


def nothing(done):
    return []


def sharpened(done):
    return [Sharpen()]


def constant():
    return tiny_agent(tiny_env(lambda *_: 0.5, stop_ids=[]), n_envs=N_ENVS)


def varied():
    return tiny_agent(tiny_env(stop_ids=[]), n_envs=N_ENVS, learning_rate=1e-6, lm=tiny())


def late_groups():
    env = tiny_env(lambda *_: 0.5, stop_ids=[], samples_per_prompt=3, score_at="rollout_end")
    return tiny_agent(env, n_envs=N_ENVS)


def messages(model, n_rollouts, callbacks):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(n_rollouts * ROLLOUT, callback=[*callbacks, TrainingWarnings()], reset_num_timesteps=False)
    return [str(warning.message) for warning in caught if "tokens: " in str(warning.message)]


@pytest.mark.parametrize(
    ("build", "others", "words"),
    [
        (varied, divergences, "negative: it is below 0 for 5 rollouts"),
        (constant, nothing, "reward: all 32 last episodes earned 2"),
        pytest.param(late_groups, nothing, "last episodes earned 0.5", marks=pytest.mark.slow),
        pytest.param(varied, sharpened, "The entropy has collapsed: it fell from", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_warns_as_one_that_was_never_stopped(build, others, words, tmp_path):
    whole = messages(build(), ROLLOUTS, others(0))
    assert sum(words in message for message in whole) == 1
    for done in (2, 5):
        model = build()
        before = messages(model, done, others(0))
        save_checkpoint(model, tmp_path / "saved", overwrite=True)
        again = build()
        load_checkpoint(again, tmp_path / "saved")
        assert before + messages(again, ROLLOUTS - done, others(done)) == whole, done


def test_what_was_loaded_is_kept_where_nobody_asks_for_it(tmp_path):
    model = constant()
    messages(model, 5, [])
    save_checkpoint(model, tmp_path / "saved")
    again = constant()
    load_checkpoint(again, tmp_path / "saved")
    again.learn(ROLLOUT, reset_num_timesteps=False)
    save_checkpoint(again, tmp_path / "saved", overwrite=True)
    last = constant()
    load_checkpoint(last, tmp_path / "saved")
    assert messages(last, 5, []) == []  # the warning came before the first checkpoint


def test_counts_of_failures_go_on(tmp_path):
    def fails_early(prompt, preds, done):
        if failing and done:
            raise OSError("gone")
        return float(preds[-1])

    def agent():
        return tiny_agent(tiny_env(fails_early, on_failure="drop", stop_ids=[]), n_envs=N_ENVS)

    failing = False
    model = agent()
    model.learn(12 * ROLLOUT)  # 96 episodes
    env = model.get_env().env
    env.failures.count(5, 5)
    metrics = EpisodeMetrics()
    metrics._has_failed = True
    model.learn(ROLLOUT, callback=metrics, reset_num_timesteps=False)
    save_checkpoint(model, tmp_path / "saved")
    again = agent()
    load_checkpoint(again, tmp_path / "saved")
    again.learn(ROLLOUT, callback=EpisodeMetrics(), reset_num_timesteps=False, log_interval=None)
    assert again.logger.name_to_value["episode/dropped"] == 0
    failing = True
    with pytest.raises(RewardError, match="got 13 of the last 125"):
        again.learn(ROLLOUT, reset_num_timesteps=False)
