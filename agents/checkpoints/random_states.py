"""The states of the random generators that training draws from: torch, numpy, Python, the policy and the buffer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from ..policies.lm_policy import LMPolicy
from ..steps.step import sequence_buffer


def generator_tensors(model: OnPolicyAlgorithm) -> dict[str, Tensor]:
    """Return the states of torch's generators, (n_bytes,) uint8 each: the default ones and the policy's."""
    policy = cast("LMPolicy", model.policy)
    states = {
        "torch": torch.get_rng_state(),
        "policy": policy.generator.get_state(),
        "predict": policy.predict_generator.get_state(),
    }
    for index in range(torch.cuda.device_count()):
        states[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def generator_meta(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """Return the states of the other generators, in a form that fits JSON."""
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "python_random": random.getstate(),
        "numpy_random": [name, keys.tolist(), *rest],
        "minibatches": sequence_buffer(model).rng.bit_generator.state,
    }


def load_generators(model: OnPolicyAlgorithm, states: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Set all generators to the states that `generator_tensors` and `generator_meta` returned."""
    torch.set_rng_state(states["torch"])
    policy = cast("LMPolicy", model.policy)
    policy.generator.set_state(states["policy"])
    policy.predict_generator.set_state(states["predict"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in states:  # the checkpoint may come from a machine with fewer GPUs
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
    version, internal, gauss = meta["python_random"]
    random.setstate((version, tuple(internal), gauss))  # JSON turned the tuple into a list
    name, keys, *rest = meta["numpy_random"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    sequence_buffer(model).rng.bit_generator.state = meta["minibatches"]
