"""Tiny models and agents for the tests that train, and how two of them are compared."""

import torch
from stable_baselines3 import PPO
from transformers import GPT2Config

from agents.build import make_agent
from textenv import CharTokenizer, TextEnv

TOKENIZER = CharTokenizer()
PROMPTS = ("ab", "cde", "fghi", "j", "kl")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tiny_config(vocab_size=len(TOKENIZER), **kwargs):
    """A GPT-2 of two layers whose end token is the `CharTokenizer`'s."""
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, **NO_DROPOUT, **kwargs}
    return GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **shape)


def length_and_letters(prompt, preds, done):
    """A reward that differs from text to text: named parts, at the end."""
    return {"length": 0.1 * len(preds), "letters": sum(preds.ids) / 100} if done else 0.0


def tiny_env(reward=length_and_letters, prompts=PROMPTS, max_new_tokens=4, cls=TextEnv, **kwargs):
    if cls is TextEnv:
        kwargs["reward"] = reward
    return cls(prompts, TOKENIZER, max_new_tokens=max_new_tokens, **kwargs)


def tiny_agent(env=None, n_envs=4, algorithm=PPO, lm=None, **kwargs):
    """An agent that visibly learns in a few iterations: a large learning rate, one or two epochs."""
    if algorithm is PPO:
        kwargs = {"n_epochs": 2, "batch_size": None, **kwargs}
        kwargs["batch_size"] = kwargs["batch_size"] or n_envs * kwargs.get("n_steps", 4)
    settings = {"seed": 0, "device": "cpu", "learning_rate": 1e-2, **kwargs}
    return make_agent(env or tiny_env(), lm or tiny_config(), n_envs=n_envs, algorithm=algorithm, **settings)


def weights(model):
    """A copy of all weights of the policy."""
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def same_weights(first, second):
    """Whether two results of `weights` are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
