"""An env of few texts with masks, and agents on it, for the tests of values by Monte Carlo."""

from sb3_contrib import MaskablePPO

from agents.evaluation.generation import run_episodes
from tests.helpers.models import randomise_critic, tiny
from tests.helpers.training import tiny_agent
from textenv import Preds

A, B = 1, 2  # the ids of "a" and "b"; 0 ends a text
FEW = [0, A, B]


def few_tokens(prompt, preds):
    """Allow the end, "a" and "b"; after two tokens nothing but letters, so that the support changes on the way."""
    return FEW[1:] if len(preds) == 2 else FEW


def letters(prompt, preds, done):
    """Reward each "a", and the end of a text by its length."""
    return float(preds.ids[-1] == A) + (0.3 * len(preds) if done else 0.0)


def agent_of(env, lm=None, **kwargs):
    if env.masks:
        kwargs = {"algorithm": MaskablePPO, "n_epochs": 2, "batch_size": 4 * kwargs.get("n_steps", 4), **kwargs}
    model = tiny_agent(env, lm=lm or tiny(), **kwargs)
    randomise_critic(model.policy)
    return model


def episode_of(model, prompt=0, seed=0):
    env = model.get_env().unwrapped.env
    return run_episodes(model.policy, env, [env.prompts[prompt]], seed=seed)[0].generation


def preds_of(env, prompt, written):
    return Preds(env.tokenizer, list(written), context=prompt.ids[-4:])
