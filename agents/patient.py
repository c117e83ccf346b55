"""What the doctor examines: policy, env and a small rollout of theirs, taken without leaving a trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from textenv.env import TextEnv
from textenv.episode import PADDING, SEPARATOR

from .actor_critic import LMActorCritic
from .buffers import RolloutView, SequenceRolloutBuffer
from .policies import LMPolicy

N_STEPS = 6
RESET_STEP = 3  # one row begins anew here, whatever it has written
TOLERANCE = 1e-3  # nats: of a log-probability in float32
TOLERANCE_16_BIT = 0.1  # half of PPO's usual clip range


class Subject(NamedTuple):
    """What is examined; `model` is None where only a policy was given."""

    policy: LMPolicy
    env: TextEnv
    model: OnPolicyAlgorithm | None


class Sample(NamedTuple):
    """A few steps of the policy on rows of different length, with restarts in the middle, as PPO would collect them."""

    observations: list[Tensor]  # (B, L) a step
    view: RolloutView
    values: Tensor  # (N,) as collected
    log_probs: Tensor  # (N,) as collected


def tolerance(lm: LMActorCritic) -> float:
    """Return by how many nats two computations of one log-probability may differ."""
    is_16_bit = lm.autocast is not None or any(weight.element_size() < 4 for weight in lm.backbone.parameters())
    return TOLERANCE_16_BIT if is_16_bit else TOLERANCE


def start_rows(env: TextEnv) -> list[np.ndarray]:
    """Return prompts of clearly different lengths: the longest, the shortest, a half of the longest, one token."""
    by_length = sorted((prompt.ids for prompt in env.prompts), key=len)
    longest = by_length[-1]
    return [longest, by_length[0], longest[: (len(longest) + 1) // 2], longest[:1]]


def observe(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Return observations of prompts that nothing follows yet, (B, width)."""
    observations = np.full((len(rows), width), PADDING, dtype=np.int64)
    for observation, row in zip(observations, rows, strict=True):
        observation[: len(row)] = row
        observation[len(row)] = SEPARATOR
    return observations


@torch.no_grad()
def take_sample(policy: LMPolicy, env: TextEnv) -> Sample:
    """Collect a few steps with the policy's own `forward`; the env's hooks are not called.

    Raises:
        ValueError: If the policy returns a value or log-probability that is not finite.
    """
    assert policy.observation_space.shape is not None and isinstance(policy.action_space, spaces.Discrete)
    starts = start_rows(env)
    n_rows = len(starts)
    current = observe(starts, policy.observation_space.shape[0])
    buffer = SequenceRolloutBuffer(
        N_STEPS, policy.observation_space, policy.action_space, policy.device, gamma=1.0, n_envs=n_rows
    )
    generated, is_start = np.zeros(n_rows, dtype=np.int64), np.ones(n_rows)
    observations = []
    policy.set_training_mode(False)
    for step in range(N_STEPS):
        tensor = torch.as_tensor(current, device=policy.device)
        actions, values, log_probs = policy.forward(tensor)
        if not bool(torch.isfinite(values).all() and torch.isfinite(log_probs).all()):
            raise ValueError("the model's values or log-probabilities are not finite")
        taken = actions.cpu().numpy()
        buffer.add(current, taken, np.zeros(n_rows, dtype=np.float32), is_start, values, log_probs)
        observations.append(tensor)
        current, generated = current.copy(), generated + 1
        current[np.arange(n_rows), (current != PADDING).sum(axis=1)] = taken
        is_over = (generated >= env.rules.max_new_tokens) | np.isin(taken, env.rules.stop_ids)
        is_over[1] |= step + 1 == RESET_STEP
        for row in np.flatnonzero(is_over):
            start = starts[(row + step) % n_rows]
            current[row] = observe([start], current.shape[1])
            generated[row] = 0
        is_start = is_over.astype(np.float32)
    buffer.compute_returns_and_advantage(torch.zeros(n_rows), is_start)
    view = buffer.view()
    collected = [torch.as_tensor(array[view.steps, view.lanes]) for array in (buffer.values, buffer.log_probs)]
    return Sample(observations, view, *collected)


@contextmanager
def undisturbed(policy: LMPolicy, env: TextEnv) -> Iterator[None]:
    """Leave weights' gradients, modes, caches and all random generators as they were, whatever happens inside."""
    lm = policy.lm
    caches, terminal = (lm.rollout_cache, lm.predict_cache), policy._terminal_values
    take_from, policy.take_from = policy.take_from, None
    lm.rollout_cache, lm.predict_cache = lm.backbone.new_cache(), lm.backbone.new_cache()
    modes = [(module, module.training) for module in policy.modules()]
    gradients = [(weight, weight.grad) for weight in policy.parameters()]
    generators = [(generator, generator.get_state()) for generator in (policy.generator, policy.predict_generator)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    env_state = copy.deepcopy(env.np_random.bit_generator.state)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            for weight, _ in gradients:
                weight.grad = None
            yield
        finally:
            for weight, gradient in gradients:
                weight.grad = gradient
            for module, mode in modes:
                module.training = mode
            for generator, state in generators:
                generator.set_state(state)
            lm.rollout_cache, lm.predict_cache = caches
            policy._terminal_values, policy.take_from = terminal, take_from
            random.setstate(python_state)
            np.random.set_state(cast("tuple[str, np.ndarray, int, int, float]", numpy_state))
            env.np_random.bit_generator.state = env_state
