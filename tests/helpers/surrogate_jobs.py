"""Jobs for several processes that train with a surrogate, an aggregation and KL in the loss."""

import torch

import agents.rollout.aggregation
from agents import KLPenalty
from tests.helpers.jobs import LETTERS, N_LANES, choose_by_row, weights_of
from tests.helpers.training import tiny_agent, tiny_config, tiny_env


def surrogate_update(surrogate, aggregation, off=False, estimator=None, shard=None):
    """Train one rollout of texts that are shorter in rank 0; `off` counts the sequences of this process alone.

    With an `estimator`, the loss has a divergence from another model beside.
    """
    choose_by_row()
    if off:
        agents.rollout.aggregation.gather = lambda what, value: [value]
    # Lanes alternate between two processes. Whichever later prompt a lane gets, it is the same.
    rows = [{"prompt": LETTERS[i] if i < N_LANES else "z", "max_new_tokens": 3 + i % 2} for i in range(40)]
    env = tiny_env(prompts=rows, stop_ids=(), order="sequential")
    policy_kwargs = {"surrogate": surrogate, "optimizer_class": torch.optim.SGD, "shard": shard}
    buffer_kwargs = {"aggregation": aggregation, "normalize_advantage": True}
    options = {"policy_kwargs": policy_kwargs, "rollout_buffer_kwargs": buffer_kwargs}
    model = tiny_agent(env, N_LANES, n_epochs=4, learning_rate=0.05, **options)
    other = tiny_config(initializer_range=0.5)
    penalty = [KLPenalty(1.0, other, estimator, where="loss")] if estimator else []
    model.learn(4 * N_LANES, callback=penalty)
    return weights_of(model)
