"""Learning toy tasks: from chance to over 0.9 in a fixed budget, and not with the reward switched off (E11)."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents import AdaptiveCoef, KLPenalty, LastLayers, LoRA, SharedCritic
from agents.build import make_agent
from agents.evaluation.generation import generate
from tests.helpers.models import seldom, tiny_mixture
from tests.helpers.training import tiny_config, train_until
from textenv import CharTokenizer, TextEnv

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LETTERS = "abcdefg"
TOKENIZER = CharTokenizer(LETTERS)
PROMPTS = [first + second for first in LETTERS for second in LETTERS]


def always_c(prompt, text, ids):
    return text.count("c") / 4


def copies_the_last(prompt, text, ids):
    return float(text == prompt[-1])


def four_tokens(prompt, text, ids):
    return float(len(ids) == 4 and ids[-1] == TOKENIZER.eos_token_id)


class Task(NamedTuple):
    score: Callable[[str, str, Any], float]
    env: dict[str, Any]
    iterations: int
    agent: dict[str, Any]


TASKS = {
    "always": Task(always_c, {"max_new_tokens": 4, "stop_ids": ()}, 24, {"n_envs": 64, "learning_rate": 1e-2}),
    "copy": Task(
        copies_the_last,
        {"max_new_tokens": 1, "stop_ids": ()},
        60,
        {"n_envs": 256, "learning_rate": 3e-3, "ent_coef": 0.1},
    ),
    "length": Task(
        four_tokens,
        {"max_new_tokens": 8},
        64,
        {"n_envs": 128, "learning_rate": 3e-3, "ent_coef": 0.05, "n_epochs": 5},
    ),
}


def build(task, reward=None, algorithm=PPO, score_at="step", shape=None, lm=None, **kwargs):
    def scored(prompt, preds, done):
        return task.score(str(prompt), preds.text, preds.ids) if done else 0.0

    env = TextEnv(PROMPTS, TOKENIZER, reward=reward or scored, score_at=score_at, **task.env)
    lm = lm or tiny_config(
        vocab_size=len(TOKENIZER), **{"n_embd": 32, "n_layer": 1, "initializer_range": 0.1, **(shape or {})}
    )
    settings = {**task.agent, "seed": 0, "device": "cpu", **kwargs}
    if algorithm is PPO:
        settings.setdefault("batch_size", settings["n_envs"] * settings.get("n_steps", task.env["max_new_tokens"]) // 2)
    return make_agent(env, lm, algorithm=algorithm, **settings)


def mean_score(model, task):
    """Return the mean score of four fresh samples of every prompt."""
    samples = generate(model, PROMPTS, TOKENIZER, 4, **task.env)
    return float(np.mean([task.score(str(sample.prompt), sample.text, sample.ids) for sample in samples]))


def learn(model, task, iterations=None, callback=None):
    """Train until the task is learnt, for its budget at most; return the mean score before and after."""
    before = mean_score(model, task)
    return before, train_until(model, lambda: mean_score(model, task), iterations or task.iterations, callback)


PARTS = {
    "lora": (LoRA(), None),
    "dora": (LoRA(use_dora=True, use_rslora=True), None),
    "experts": (LoRA(target_modules=EXPERTS), tiny_mixture(vocab_size=len(TOKENIZER), hidden_size=32)),
    "last": (LastLayers(1), None),
}

HARD_ONES_SLOWLY = ["always", *(pytest.param(name, marks=pytest.mark.slow) for name in ("copy", "length"))]


@pytest.mark.parametrize("name", HARD_ONES_SLOWLY)
def test_e11_it_learns(name):
    """E11: always one token, copying the prompt's last token, and a length go from chance to over 0.9."""
    task = TASKS[name]
    before, after = learn(build(task), task)
    assert before < 0.35 and after > 0.9


@pytest.mark.slow
def test_e11_a2c_learns():
    task = TASKS["always"]
    before, after = learn(build(task, algorithm=A2C), task, iterations=64)
    assert before < 0.35 and after > 0.9


TRPO_TASKS = {  # the trust region takes the place of a learning rate and of an entropy bonus
    name: TASKS[name]._replace(iterations=iterations, agent={"n_envs": n_envs, "target_kl": 0.1, "cg_max_steps": 5})
    for name, iterations, n_envs in (("always", 32, 32), ("copy", 48, 128), ("length", 64, 64))
}


@pytest.mark.parametrize("name", seldom(TASKS))
def test_e11_trpo_learns(name):
    task = TRPO_TASKS[name]
    before, after = learn(build(task, algorithm=TRPO, n_critic_updates=2), task)
    assert before < 0.35 and after > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "iterations"), [(A2C, 30), (TRPO, 8)])
def test_e11_other_algorithms_do_not_learn_with_the_reward_switched_off(algorithm, iterations):
    task = (TRPO_TASKS if algorithm is TRPO else TASKS)["always"]
    model = build(task, reward=lambda prompt, preds, done: 0.0, algorithm=algorithm)
    before, after = learn(model, task, iterations=iterations)
    assert after < 0.35 and abs(after - before) < 0.15


@pytest.mark.parametrize("name", HARD_ONES_SLOWLY)
def test_e11_it_does_not_learn_with_the_reward_switched_off(name):
    """The budget is the same, and the score is measured, but not rewarded."""
    task = TASKS[name]
    model = build(task, reward=lambda prompt, preds, done: 0.0)
    before, after = learn(model, task)
    assert after < 0.35 and after - before < 0.15  # the entropy bonus lowers a score above chance


@pytest.mark.slow
def test_e11_it_does_not_learn_from_random_rewards():
    """With noise as the reward, training changes the policy, but not towards the task."""
    task, rng = TASKS["copy"], np.random.default_rng(0)
    before, after = learn(build(task, reward=lambda prompt, preds, done: float(rng.random())), task)
    assert after < 0.45


@pytest.mark.slow
def test_e11_a_huge_penalty_keeps_it_at_the_start():
    """A coefficient of 100 outweighs the score; a small one does not prevent learning."""
    task, after = TASKS["always"], {}
    for coef in (0.01, 100.0):
        model = build(task, learning_rate=3e-3)
        before, after[coef] = learn(model, task, iterations=48, callback=KLPenalty(coef))
    assert after[0.01] > 0.9 and abs(after[100.0] - before) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_e11_a_part_of_the_model_learns_and_a_huge_penalty_keeps_it_at_the_start(name):
    """Adapters or the last layer are trained; the reference switches adapters off, or shares the frozen weights."""
    train, lm = PARTS[name]
    task, after = TASKS["always"], {}
    for coef in (0.01, 100.0):
        # The head stays as it is drawn: with small weights it could not be sure of any token. The critic is detached,
        # since the value loss of rewards in the hundreds would move the shared trunk whatever the penalty says.
        kwargs = {"train": train, "critic": SharedCritic(detach=True)}
        shape = {"n_layer": 2, "initializer_range": 0.3}
        model = build(task, shape=shape, lm=lm, learning_rate=3e-3, policy_kwargs=kwargs)
        before, after[coef] = learn(model, task, iterations=48, callback=KLPenalty(coef))
    assert before < 0.35 and after[0.01] > 0.9 and abs(after[100.0] - before) < 0.15


@pytest.mark.slow
def test_c4_an_adaptive_coefficient_brings_the_divergence_to_its_target():
    """It ends within a factor of two; without a penalty, the divergence is far larger."""
    task, divergence = TASKS["always"], {}
    target = 1.0
    for name, coef in (("none", 0.0), ("adaptive", AdaptiveCoef(0.05, target, 64))):
        model, seen = build(task, n_epochs=2), Divergence()
        model.learn(60 * model.n_steps * model.n_envs, callback=[KLPenalty(coef), seen])
        divergence[name] = np.mean(seen.values[-15:])
    assert divergence["none"] > 4 * target
    assert target / 2 < divergence["adaptive"] < 2 * target


class Divergence(BaseCallback):
    """A callback that keeps `kl/sequence` of each rollout."""

    def _on_training_start(self):
        self.values = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.values.append(self.logger.name_to_value["kl/sequence"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", TASKS)
def test_e11_it_learns_from_other_seeds(name, seed):
    before, after = learn(build(TASKS[name], seed=seed), TASKS[name])
    assert before < 0.35 and after > 0.9


@pytest.mark.slow
def test_e11_it_learns_from_late_scores_of_episodes_that_straddle_rollouts():
    """Scores come at the end of a rollout, which is half as long as the longest episode."""
    task = TASKS["length"]
    model = build(task, score_at="rollout_end", n_steps=4, rollout_buffer_kwargs={"complete_episodes": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rollout may have few complete sequences
        before, after = learn(model, task, iterations=96)
    assert before < 0.35 and after > 0.9
