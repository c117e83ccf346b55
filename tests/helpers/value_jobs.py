"""Jobs for several processes that log figures of a critic's values."""

import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import EpisodeMetrics
from tests.helpers.jobs import N_LANES, PROMPTS, choose_by_row, uneven
from tests.helpers.training import tiny_agent, tiny_env

THIRDS = ("first", "middle", "last")


class Thirds(BaseCallback):
    """Keeps the explained variance of each third of the texts, by its name, of each rollout."""

    def _on_training_start(self):
        self.rows = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        values = self.model.logger.name_to_value
        keys = {third: f"value/explained_variance_{third}" for third in THIRDS}
        self.rows.append({third: values[key] for third, key in keys.items() if key in values})


def explained_thirds():
    """Train two rollouts of texts that depend on their prompts alone; return the rows of `Thirds`."""
    choose_by_row()
    env, logged = tiny_env(uneven, prompts=PROMPTS), Thirds()
    policy_kwargs = {"optimizer_class": torch.optim.SGD, "value_norm": "popart"}
    model = tiny_agent(env, N_LANES, learning_rate=0.05, policy_kwargs=policy_kwargs)
    model.learn(2 * N_LANES * env.rules.max_new_tokens, callback=[EpisodeMetrics(), logged])
    return logged.rows
