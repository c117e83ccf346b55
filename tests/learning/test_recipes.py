"""Learning by each recipe: from chance to over 0.8 in 15 rollouts, and not from a reward that says nothing."""

import random

import numpy as np
import pytest

from agents import RECIPES, make_agent
from agents.evaluation.generation import generate
from tests.helpers.training import tiny_config
from tests.learning.test_group_learning import PROMPTS, RULES, TOKENIZER, share_of_c
from textenv import TextEnv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")]


def after(recipe, reward, seed):
    """Train; return the share of "c" in texts by the trained policy, an eighth by chance."""
    samples = RECIPES[recipe].get("env.args.samples_per_prompt", 1)
    env = TextEnv(PROMPTS, TOKENIZER, reward=reward, samples_per_prompt=samples, score_at="done", **RULES)
    lm = tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, initializer_range=0.1)
    settings = {"n_envs": 64, "learning_rate": 1e-2, "batch_size": 128, "seed": seed, "device": "cpu"}
    model = make_agent(env, lm, recipe=recipe, **settings)
    model.learn(15 * model.n_steps * model.n_envs)
    texts = generate(model, PROMPTS, TOKENIZER, 4, **RULES)
    return float(np.mean([share_of_c(None, text, True) for text in texts]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns(recipe):
    assert after(recipe, share_of_c, seed=0) > 0.8


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_does_not_learn_from_noise(recipe):
    draws = random.Random(0)
    assert after(recipe, lambda prompt, preds, done: draws.random() if done else 0.0, seed=0) < 0.5
