"""Engines that write rollouts in the test process, and agents that use them."""

import numpy as np
import torch
from stable_baselines3 import PPO

from agents.engines.process import Setup, Writer, write
from agents.engines.protocol import Completion
from tests.helpers.models import randomise_critic
from tests.helpers.training import tiny_agent, tiny_config, tiny_env

LANES, STEPS, LONGEST = 6, 8, 7


class InProcess:
    """The writer of a `LocalEngine` without its process; it keeps all requests."""

    def __init__(self, lm=None, vocab_size=33, autocast=None, n_rows=64, takes_weights=True, heat=1.0):
        self.writer = Writer(Setup(0, lm or tiny_config(), vocab_size, autocast, "cpu", n_rows))
        self.takes_weights, self.heat = takes_weights, heat
        self.n_loads, self.calls, self.seeds = 0, [], []

    def load_weights(self, weights):
        self.n_loads += 1
        if self.takes_weights or self.n_loads == 1:
            self.writer.load({name: weight.detach().clone() for name, weight in weights})

    def generate(self, requests, temperature, seed):
        self.calls.append([(request.tokens.tolist(), request.most_new) for request in requests])
        self.seeds.append(seed)
        return write(self.writer.lm, requests, self.heat * temperature, seed, self.writer.n_rows)

    def close(self):
        """Do nothing: there is nothing to release."""


class Background(InProcess):
    """An engine of which `EngineRollouts` believes that it writes elsewhere; it writes at once."""

    def start(self, requests, temperature, seed):
        completions = self.generate(requests, temperature, seed)
        return lambda: completions


class Scripted:
    """Answers every request with the same tokens and log-probabilities."""

    def __init__(self, tokens, log_probs):
        self.completion = Completion(np.array(tokens), np.array(log_probs, dtype=np.float32))

    def load_weights(self, weights):
        """Ignore the weights: the answer is fixed."""

    def generate(self, requests, temperature, seed):
        return [self.completion] * len(requests)

    def close(self):
        """Do nothing: there is nothing to release."""


def often(number):
    """Return env arguments by which every `number`-th token ends the text, so that episodes have all lengths."""
    return {"stop_ids": range(0, 33, number), "max_new_tokens": LONGEST}


def build(env_kwargs, agent_kwargs):
    settings = {"n_envs": LANES, "n_steps": STEPS, "learning_rate": 0.03, **agent_kwargs}
    if settings.get("algorithm", PPO) is PPO:
        settings |= {"batch_size": LANES * STEPS, "n_epochs": 2}
    policy_kwargs = {"optimizer_class": torch.optim.SGD, **settings.pop("policy_kwargs", {})}
    model = tiny_agent(tiny_env(**env_kwargs), policy_kwargs=policy_kwargs, **settings)
    if "critic" not in policy_kwargs:
        randomise_critic(model.policy)
    return model
