"""Jobs for several processes that train with each estimate of advantages, one after the other."""

import torch

from agents.models.sampling import TokenDistribution
from tests.helpers.jobs import choose_by_row, scripted_updates


def choose_by_sample():
    """Patch `choose_by_row` further: the two samples of a prompt, in neighbouring lanes, get other tokens."""
    choose_by_row()
    chosen = TokenDistribution.get_actions

    def of_sample(self, *args):
        tokens = chosen(self, *args)
        return (tokens + 5 * (torch.arange(len(tokens)) % 2) - 1) % 31 + 1

    TokenDistribution.get_actions = of_sample
    return chosen


def above_the_group(episodes):
    """Return each score above the mean of its group."""
    groups = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode.score)
    return [episode.score - sum(groups[episode.group]) / len(groups[episode.group]) for episode in episodes]


def to_come(episodes):
    """Return, for each token, what is still to come of rewards minus penalties, above the critic's value."""
    return [
        (episode.rewards - episode.penalties)[::-1].cumsum()[::-1] - episode.values if len(episode.actions) > 2 else 0.0
        for episode in episodes
    ]


PAIRS = {"env_kwargs": {"samples_per_prompt": 2}, "vf_coef": 0.0}
ADVANTAGES = {
    "reinforce++": {"rollout_buffer_kwargs": {"advantage": "reinforce++"}, "vf_coef": 0.0},
    "reinforce++_baseline": {**PAIRS, "rollout_buffer_kwargs": {"advantage": "reinforce++_baseline"}},
    "two lambdas": {"rollout_buffer_kwargs": {"critic_lambda": 1.0}, "gae_lambda": 0.5},
    "lambda by length": {"rollout_buffer_kwargs": {"lambda_alpha": 0.5, "normalize_advantage": True}},
    "function of tokens": {"rollout_buffer_kwargs": {"advantage": to_come, "critic_lambda": 1.0}},
    "function of groups": {**PAIRS, "rollout_buffer_kwargs": {"advantage": above_the_group}},
}


def every_advantage():
    """Run `scripted_updates` with each of `ADVANTAGES`; return the results by name."""
    return {name: one_advantage(name) for name in ADVANTAGES}


def one_advantage(name, off=None):
    """Run `scripted_updates` with one of `ADVANTAGES`, with gradients so free that the scale of advantages counts."""
    usual = choose_by_sample() if "env_kwargs" in ADVANTAGES[name] else None
    result = scripted_updates(1, off, max_grad_norm=100.0, **ADVANTAGES[name])
    if usual is not None:
        TokenDistribution.get_actions = usual
    return result
