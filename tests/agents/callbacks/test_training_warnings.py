"""Warnings while a model trains: each fires once in a broken run, and none in a healthy one."""

import warnings

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch.nn import functional

from agents import KLPenalty, RolloutStep, TrainingWarnings
from tests.helpers.examining import Broken
from tests.helpers.models import tiny
from tests.helpers.training import same_weights, tiny_agent, tiny_env, weights

ROLLOUT = 32 * 4


def messages(model, *callbacks, n_rollouts=4, **options):
    """Train, and return the warnings of `TrainingWarnings`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(n_rollouts * ROLLOUT, callback=[*callbacks, TrainingWarnings(**options)])
    return [str(warning.message) for warning in caught if "tokens: " in str(warning.message)]


def agent(env=None, **kwargs):
    return tiny_agent(env, n_envs=32, **{"learning_rate": 1e-3, **kwargs})


def assert_once(warned, *words):
    assert len(warned) == 1, warned
    for word in words:
        assert word in warned[0], warned


def ends_with_odds(logit):
    """Return a model whose end token (id 0) has `logit` added: it always, or never, ends."""

    def shift(module, inputs, output):
        return output + logit * (torch.arange(output.shape[-1]) == 0)

    return Broken(lambda model: model.get_output_embeddings().register_forward_hook(shift))


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_a_healthy_run_is_silent(n_epochs):
    assert messages(agent(n_epochs=n_epochs), KLPenalty(0.1), n_rollouts=7) == []


def test_a_healthy_run_that_learns_is_silent():
    env = tiny_env(lambda prompt, preds, done: float(preds[-1] == 1), stop_ids=[])
    model = agent(env, learning_rate=1e-2)
    assert messages(model, KLPenalty(0.01), n_rollouts=7) == []


def test_training_is_the_same_with_and_without():
    silent, watched = agent(), agent()
    silent.learn(4 * ROLLOUT)
    watched.learn(4 * ROLLOUT, callback=TrainingWarnings())
    assert same_weights(weights(silent), weights(watched))


def test_equal_rewards_are_named():
    warned = messages(agent(tiny_env(lambda prompt, preds, done: 0.5 if done else 0.0)))
    assert_once(warned, "earned 0.5", "partial credit")


@pytest.mark.parametrize("score_at", ["done", "rollout_end"])
def test_equal_rewards_that_come_late_are_named(score_at):
    assert_once(messages(agent(tiny_env(lambda *_: 0.5, score_at=score_at))), "earned 0.5")


def test_texts_that_never_end_are_named():
    assert_once(messages(agent(lm=ends_with_odds(-50.0))), "cut by length", "stop_ids=[0]", "max_new_tokens=4")


def test_texts_of_fixed_length_are_silent():
    assert messages(agent(tiny_env(stop_ids=[]))) == []


def test_empty_texts_are_named():
    warned = messages(
        agent(tiny_env(lambda prompt, preds, done: float(sum(map(ord, prompt)))), lm=ends_with_odds(50.0))
    )
    # Nothing is left to explore from the start on, so the entropy does not fall.
    assert_once(warned, "an end token and nothing else")


class LoggedKL(RolloutStep):
    """Logs given values as the divergence."""

    key = "LoggedKL"

    def __init__(self, values):
        super().__init__()
        self.values = iter(values)

    def __call__(self, buffer):
        self.model.logger.record("kl/token", next(self.values))


@pytest.mark.parametrize(
    ("values", "n_warnings"),
    [([-0.1] * 7, 1), ([-0.1] * 4 + [0.1] + [-0.1], 0), ([-1e-5] * 6, 0)],
)
def test_a_divergence_below_zero_for_long_is_named(values, n_warnings):
    warned = messages(agent(), LoggedKL(values), n_rollouts=len(values))
    assert len(warned) == n_warnings
    if warned:
        assert "negative: it is below 0 for 5 rollouts, last -0.1" in warned[0] and "doctor" in warned[0]


def test_a_reference_that_the_samples_do_not_come_from_is_named():
    class Hotter(KLPenalty):
        """Sees each sampled token half a nat less probable than it was."""

        def __call__(self, buffer):
            buffer.log_probs -= 0.5
            super().__call__(buffer)
            buffer.log_probs += 0.5

    assert_once(messages(agent(), Hotter(0.01), patience=3), "below 0 for 3 rollouts")


def test_a1_ratios_away_from_one_are_named():
    model = agent(tiny_env(stop_ids=[]))

    def drop(module, inputs, output):
        return functional.dropout(output, 0.3, model.policy.training)

    # After the policy was built, since the probe at construction refuses such a model.
    model.policy.lm.backbone.model.transformer.ln_f.register_forward_hook(drop)
    assert_once(messages(model), "log-ratio", "dropout")


class Disturb(BaseCallback):
    """Scales the last layer norm's weights at a step."""

    def __init__(self, factor, step):
        super().__init__()
        self.factor, self.step = factor, step

    def _on_step(self):
        if self.n_calls == self.step:
            with torch.no_grad():
                self.model.policy.lm.backbone.model.transformer.ln_f.weight.mul_(self.factor)
        return True


def test_a1_weights_changed_inside_a_rollout_are_named():
    model = agent(tiny_env(stop_ids=[]), lm=tiny())
    assert_once(messages(model, Disturb(1.5, step=2 * 4 + 2)), "log-ratio", "inside the rollout")


def test_an_entropy_that_collapses_is_named():
    # Between rollouts: the update and the next rollout see the same weights.
    class Sharpen(Disturb):
        def _on_rollout_start(self):
            if self.n_calls == 8:
                with torch.no_grad():
                    self.model.policy.lm.backbone.model.transformer.ln_f.weight.mul_(self.factor)

    warned = messages(agent(tiny_env(stop_ids=[]), lm=tiny(), learning_rate=1e-6), Sharpen(30.0, step=-1))
    assert_once(warned, "entropy has collapsed: it fell from", "ent_coef")


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="Expected `entropy_fraction` between 0 and 1, got 2"):
        TrainingWarnings(entropy_fraction=2.0)
    with pytest.raises(ValueError, match="Expected `patience` to be at least 1, got 0"):
        TrainingWarnings(patience=0)
