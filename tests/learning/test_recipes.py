"""Learning by each recipe: from chance to over 0.8 in 32 rollouts, and not from a reward that says nothing."""

import random
from functools import partial

import numpy as np
import pytest

from agents import RECIPES, make_agent
from tests.helpers.training import tiny_config, train_until
from tests.learning.test_group_learning import PROMPTS, RULES, TOKENIZER, share_in_texts, share_of_c
from textenv import TextEnv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")]


def after(recipe, reward, seed, n_iterations=16):
    """Train; return the share of "c" in texts by the policy, an eighth by chance; training ends once it is large."""
    samples = RECIPES[recipe].get("env.args.samples_per_prompt", 1)
    env = TextEnv(PROMPTS, TOKENIZER, reward=reward, samples_per_prompt=samples, score_at="done", **RULES)
    lm = tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, initializer_range=0.1)
    settings = {"n_envs": 64, "learning_rate": 1e-2, "batch_size": 128, "seed": seed, "device": "cpu"}
    model = make_agent(env, lm, recipe=recipe, **settings)
    return train_until(model, partial(share_in_texts, model), n_iterations)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns(recipe):
    assert after(recipe, share_of_c, seed=0, n_iterations=32) > 0.8


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_does_not_learn_from_noise(recipe):
    """Noise may well teach one policy a single letter, which is "c" once in eight seeds, but not four policies."""
    draws, shares = random.Random(0), []
    for seed in range(4):
        shares.append(after(recipe, lambda prompt, preds, done: draws.random() if done else 0.0, seed))
    assert np.mean(shares) < 0.5
