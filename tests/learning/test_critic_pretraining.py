"""Critic pretraining on texts of 24 tokens with a score at the end: fewer rollouts to a target than a fresh critic."""

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback

from agents import (
    PretrainedCritic,
    SeparateCritic,
    critic_agreement,
    fit_critic,
    generate,
    make_agent,
    monte_carlo_values,
)
from agents.supervised import critic_fit
from tests.helpers.training import tiny_config
from textenv import CharTokenizer, TextEnv

LETTERS = "abcd"
TOKENIZER = CharTokenizer(LETTERS)
N_TOKENS, N_LANES = 24, 16
SHAPE = tiny_config(vocab_size=len(TOKENIZER), n_layer=1, n_embd=32, n_positions=32, initializer_range=0.1)
FITTED = 8  # rollouts of the fit, which count as well
MOST = 45  # rollouts of a training that does not reach the target
SEEDS = range(6)  # a fresh critic needs 7 to 27 rollouts


def share_of_a_beside_the_prompts_own(prompt, preds, done):
    """Score the share of one letter, beside 0 to 3 points that the prompt alone decides: a critic's work."""
    return (list(preds.ids).count(1) / N_TOKENS + LETTERS.index(prompt[0])) if done else 0.0


class ToTarget(BaseCallback):
    """Ends training once half of the tokens of three rollouts in a row are the letter that scores."""

    def _on_training_start(self):
        self.shares = []

    def _on_step(self):
        return np.mean(self.shares[-3:] or [0.0]) < 0.5 or len(self.shares) < 3

    def _on_rollout_end(self):
        self.shares.append(float((self.model.rollout_buffer.actions == 1).mean()))


def agent(critic, seed):
    prompts = [first + second for first in LETTERS for second in LETTERS]
    options = {"max_new_tokens": N_TOKENS, "stop_ids": (), "seed": seed}
    env = TextEnv(prompts, TOKENIZER, reward=share_of_a_beside_the_prompts_own, **options)
    settings = {"learning_rate": 3e-3, "n_epochs": 2, "batch_size": N_LANES * N_TOKENS // 2, "vf_coef": 0.5}
    return make_agent(env, SHAPE, N_LANES, seed=seed, device="cpu", policy_kwargs={"critic": critic}, **settings)


def rollouts_to_target(critic, seed):
    """Train until the target is reached; return the number of rollouts."""
    callback = ToTarget()
    agent(critic, seed).learn(MOST * N_LANES * N_TOKENS, callback=callback)
    return len(callback.shares)


def fitted(folder, seed):
    """Fit a critic to the start; return it and the explained variance of held-out texts."""
    words = {"n_rollouts": FITTED, "n_epochs": 10, "learning_rate": 3e-3, "progress_bar": False}
    result = fit_critic(agent(SeparateCritic(SHAPE), seed), folder, **words)
    return PretrainedCritic(folder), result.after


@pytest.fixture(scope="module")
def fresh():
    return np.mean([rollouts_to_target(SeparateCritic(SHAPE), seed) for seed in SEEDS])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return the mean number of rollouts with a fitted critic, those of the fit included."""
    needed = []
    for seed in SEEDS:
        critic, explained = fitted(tmp_path_factory.mktemp("critic") / "fitted", seed)
        assert explained > 0.9
        needed.append(FITTED + rollouts_to_target(critic, seed))
    return np.mean(needed)


@pytest.mark.slow
def test_a_pretrained_critic_needs_fewer_rollouts_its_own_included(pretrained, fresh):
    assert pretrained < fresh


def exchange_returns(monkeypatch, partners):
    """Fit to the same texts and returns from now on, but to each text with the returns of its partner."""
    collect = critic_fit.collect_texts

    def exchanged(*args):
        texts = collect(*args)
        return [text._replace(returns=texts[i].returns) for text, i in zip(texts, partners(texts))]

    monkeypatch.setattr(critic_fit, "collect_texts", exchanged)


def any_text(texts):
    return np.random.default_rng(0).permutation(len(texts))


def two_letters_on(texts):
    """Return for each text one whose prompt begins two letters on: its 0 to 3 points are 2, 3, 0 and 1 in place."""
    letters = np.array([text.tokens[0] for text in texts]) - TOKENIZER.encode("a")[0]
    return [np.flatnonzero(letters == (letter + 2) % len(LETTERS))[0] for letter in letters]


@pytest.mark.slow
def test_a_critic_of_other_texts_returns_does_not_help(tmp_path, fresh, pretrained, monkeypatch):
    """The negative control."""
    exchange_returns(monkeypatch, any_text)
    needed = []
    for seed in SEEDS:
        critic, explained = fitted(tmp_path / str(seed), seed)
        assert explained < 0.2
        needed.append(FITTED + rollouts_to_target(critic, seed))
    assert np.mean(needed) > max(pretrained, 0.9 * fresh), (needed, pretrained, fresh)


def agreement_of(critic):
    """Return how a critic agrees with the values of the start by Monte Carlo, over a text of each letter's prompt."""
    model = agent(critic, seed=0)
    texts = generate(model, [2 * letter for letter in LETTERS], TOKENIZER, max_new_tokens=N_TOKENS, stop_ids=())
    return critic_agreement([monte_carlo_values(model, text, n=16, n_envs=512) for text in texts])


@pytest.mark.slow
def test_a_fitted_critic_agrees_with_the_truth_and_one_of_other_texts_does_not(tmp_path, monkeypatch):
    found = agreement_of(fitted(tmp_path / "own", 0)[0])
    assert [row.part for row in found] == ["all", "first", "middle", "last"]
    assert all(row.correlation > 0.9 and abs(row.bias) < 0.3 for row in found), found
    exchange_returns(monkeypatch, two_letters_on)
    control = agreement_of(fitted(tmp_path / "other", 0)[0])
    assert control[0].correlation < 0, control
