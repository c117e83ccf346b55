"""The subject of an examination, and a small rollout of its policy that leaves no trace."""

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
from textenv.episodes.rules import PADDING, SEPARATOR

from ..policies.lm_policy import LMPolicy
from ..rollout.buffer import RolloutView, SequenceRolloutBuffer

N_STEPS = 6  # decoding steps of the sample: enough for a restart and for cached steps on both sides of it
RESET_STEP = 3  # the step after which one row restarts, even if its text has not ended


class Subject(NamedTuple):
    """The policy, env (with its tokenizer) and algorithm under examination; `model` is None for a policy alone."""

    policy: LMPolicy
    env: TextEnv
    model: OnPolicyAlgorithm | None


class Sample(NamedTuple):
    """A few steps of the policy on rows of different length, with restarts in the middle, as PPO collects them."""

    observations: list[Tensor]  # N_STEPS tensors of shape (B, L)
    view: RolloutView  # the N collected tokens as whole sequences, as an update reads them
    values: Tensor  # (N,), as the rollout stored them
    log_probs: Tensor  # (N,), nats, as the rollout stored them


def start_rows(env: TextEnv) -> list[np.ndarray]:
    """Return the ids of five prompts: the longest, the shortest, half of the longest, its first token, and it again.

    Two rows with the same prompt show whether sharing it is exact: in the rollout, and in the update if it is long.
    """
    by_length = sorted((prompt.ids for prompt in env.prompts), key=len)
    longest = by_length[-1]
    return [longest, by_length[0], longest[: (len(longest) + 1) // 2], longest[:1], longest]


def observe(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Return the observations (B, width) of prompts that have no completion yet: prompt, separator, padding."""
    observations = np.full((len(rows), width), PADDING, dtype=np.int64)
    for observation, row in zip(observations, rows, strict=True):
        observation[: len(row)] = row
        observation[len(row)] = SEPARATOR
    return observations


@torch.no_grad()
def take_sample(policy: LMPolicy, env: TextEnv) -> Sample:
    """Collect a few steps with the policy's `forward`; no hook of the env is called.

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
    policy.set_training_mode(False)  # as SB3's `OnPolicyAlgorithm.collect_rollouts` does
    for step in range(N_STEPS):
        tensor = torch.as_tensor(current, device=policy.device)  # (B, L)
        actions, values, log_probs = policy.forward(tensor)
        if not bool(torch.isfinite(values).all() and torch.isfinite(log_probs).all()):
            raise ValueError("the model's values or log-probabilities are not finite")
        taken = actions.cpu().numpy()
        buffer.add(current, taken, np.zeros(n_rows, dtype=np.float32), is_start, values, log_probs)
        observations.append(tensor)
        current, generated = current.copy(), generated + 1
        current[np.arange(n_rows), (current != PADDING).sum(axis=1)] = taken  # behind the last token of each row
        is_over = (generated >= env.rules.max_new_tokens) | np.isin(taken, env.rules.stop_ids)
        is_over[1] |= step + 1 == RESET_STEP  # one row at least restarts while the others go on
        for row in np.flatnonzero(is_over):
            # Row 1 restarts with half of the longest prompt, whose keys and values the cache has kept.
            start = starts[(row + step - 1) % n_rows]
            current[row] = observe([start], current.shape[1])
            generated[row] = 0
        is_start = is_over.astype(np.float32)
    buffer.compute_returns_and_advantage(torch.zeros(n_rows), is_start)
    view = buffer.view()
    # The buffer's arrays are (T, B); the view has the tokens sequence by sequence, (N,).
    collected = [torch.as_tensor(array[view.steps, view.lanes]) for array in (buffer.values, buffer.log_probs)]
    return Sample(observations, view, *collected)


@contextmanager
def undisturbed(policy: LMPolicy, env: TextEnv) -> Iterator[None]:
    """Restore gradients, training modes, caches and all random generators on leaving, also after an error.

    Within, values are in the critic's units: the end of a rollout would count its returns in the `value_norm`.
    """
    modes = [(module, module.training) for module in policy.modules()]
    gradients = [(weight, weight.grad) for weight in policy.parameters()]
    generators = [(generator, generator.get_state()) for generator in (policy.generator, policy.predict_generator)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    env_state = copy.deepcopy(env.np_random.bit_generator.state)
    norm, policy.lm.value_norm = policy.lm.value_norm, None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), policy.rollout_set_aside():
        try:
            for weight, _ in gradients:
                weight.grad = None  # the timed backward pass must not add to the user's gradients
            yield
        finally:
            policy.lm.value_norm = norm
            for weight, gradient in gradients:
                weight.grad = gradient
            for module, mode in modes:
                module.training = mode
            for generator, state in generators:
                generator.set_state(state)
            random.setstate(python_state)
            np.random.set_state(cast("tuple[str, np.ndarray, int, int, float]", numpy_state))
            env.np_random.bit_generator.state = env_state
