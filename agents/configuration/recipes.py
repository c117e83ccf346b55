"""The recipes: for each published algorithm a table of settings, as a configuration would have them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SAMPLES = {"env.args.samples_per_prompt": 8}  # a group: the samples of one prompt that are compared

# Keys are those of a configuration; what a recipe does not name keeps its default. Learning rate, lengths and the size
# of rollouts depend on model and task, not on the algorithm. docs/losses.md says what each paper has besides.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ppo": {"algorithm.advantage": "gae", "kl.coef": 0.05},
        "grpo": {
            **SAMPLES,
            "algorithm.advantage": "grpo",
            "algorithm.aggregation": "sequence",
            "kl.coef": 0.04,
            "kl.estimator": "k2",
            "kl.where": "loss",
        },
        "dr_grpo": {
            **SAMPLES,
            "algorithm.advantage": "grpo_mean",
            "algorithm.aggregation": "constant",
            "kl.coef": 0.0,
        },
        "rloo": {
            **SAMPLES,
            "algorithm.advantage": "rloo",
            "algorithm.aggregation": "constant",
            "kl.coef": 0.05,
        },
        "reinforce++": {"algorithm.advantage": "reinforce++", "algorithm.aggregation": "token", "kl.coef": 0.01},
        "dapo": {
            **SAMPLES,
            "algorithm.advantage": "grpo",
            "algorithm.surrogate": {"id": "clip_higher", "args": {"low": 0.2, "high": 0.28}},
            "algorithm.aggregation": "token",
            "algorithm.min_groups": 8,
            "kl.coef": 0.0,
        },
        "gspo": {
            **SAMPLES,
            "algorithm.advantage": "grpo",
            "algorithm.surrogate": {"id": "gspo", "args": {"low": 3e-4, "high": 4e-4}},
            "algorithm.aggregation": "sequence",
            "kl.coef": 0.0,
        },
        "cispo": {
            **SAMPLES,
            "algorithm.advantage": "grpo",
            "algorithm.surrogate": {"id": "cispo", "args": {"high": 4.0}},
            "algorithm.aggregation": "token",
            "kl.coef": 0.0,
        },
        "vapo": {
            "algorithm.advantage": "gae",
            "algorithm.critic_lambda": 1.0,
            "algorithm.lambda_alpha": 1.0,
            "algorithm.surrogate": {"id": "clip_higher", "args": {"low": 0.2, "high": 0.28}},
            "algorithm.aggregation": "token",
            "algorithm.critic_warmup": 2,
            "kl.coef": 0.0,
        },
    }
)
