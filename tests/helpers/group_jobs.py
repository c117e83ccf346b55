"""Jobs of groups of samples that wait, of which several processes decide together when they are trained."""

import warnings

import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import SampleGroups
from agents.distributed.world import world
from tests.helpers.training import tiny_agent, tiny_env


def odd_in_rank_0(prompt, preds, done):
    """Reward the texts of rank 0 differently, and those of other processes alike: their groups have no signal."""
    return float(sum(preds.ids) % 2) if done and world().rank == 0 else 0.0


class Batches(BaseCallback):
    """Keeps, for each rollout, the number of texts that are trained, those that wait, and the weights before it."""

    def _on_training_start(self):
        self.rows = []

    def _on_rollout_start(self):
        self.before = torch.cat([weight.detach().flatten() for weight in self.model.policy.parameters()]).tolist()

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.rows.append((len(buffer.trained), len(buffer.waiting_episodes), self.before))


def waiting_groups(min_groups, max_rollouts, n_rollouts):
    """Train on groups of 2 texts that fill rollouts, 2 groups in each process; return the rows of `Batches`."""
    warnings.simplefilter("ignore")
    env = tiny_env(odd_in_rank_0, samples_per_prompt=2, stop_ids=())
    model, batches = tiny_agent(env, 8, rollout_buffer_kwargs={"advantage": "grpo"}), Batches()
    model.learn(n_rollouts * 32, callback=[SampleGroups(min_groups, max_rollouts), batches])
    return batches.rows
