"""The algorithm that calls a policy, found on the stack: its env, its `policy_kwargs`, and the end of a rollout."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from textenv.episodes.rules import PADDING, SEPARATOR

# Of a policy, between the algorithm and the functions below.
OWN_METHODS = ("__init__", "_build", "set_training_mode", "predict_values")


def calling_algorithm() -> BaseAlgorithm | None:
    """Return the algorithm that builds a policy, or that switches it to evaluation for a rollout; None for others.

    SB3 hands a policy the spaces of the env and its observations alone, so that the algorithm, which has the env, is
    found on the stack: `_setup_model` builds the policy, and `collect_rollouts` calls `set_training_mode`. A `predict`
    calls it, too, but from a method of the policy.
    """
    caller = _caller(sys._getframe(1)).f_locals.get("self")
    return caller if isinstance(caller, BaseAlgorithm) else None


def keep_spec(algorithm: BaseAlgorithm, lm: Any) -> None:
    """Put the spec of a policy's model into the `policy_kwargs` of its algorithm.

    SB3 `base_class.save` pickles them, and a live model there would be stored a second time beside its weights.
    """
    if "lm" in algorithm.policy_kwargs:
        algorithm.policy_kwargs = {**algorithm.policy_kwargs, "lm": lm}  # the caller's dict stays as it is


def is_rollouts_end() -> bool:
    """Return whether an algorithm asks a policy for values at the end of a rollout.

    SB3 `on_policy_algorithm.collect_rollouts` and sb3_contrib `ppo_mask.MaskablePPO.collect_rollouts` call
    `predict_values` on the observations after the last step. `buffers.RolloutBuffer.compute_returns_and_advantage`
    multiplies their values by `1.0 - dones`: by 0 in a lane whose next episode has just begun.
    """
    caller = _caller(sys._getframe(1))
    return caller.f_code.co_name == "collect_rollouts" and isinstance(caller.f_locals.get("self"), BaseAlgorithm)


def _caller(frame: FrameType) -> FrameType:
    """Return the frame that has called a policy, given the frame of one of its `OWN_METHODS`."""
    policy = frame.f_locals.get("self")
    while frame.f_back is not None and frame.f_locals.get("self") is policy and frame.f_code.co_name in OWN_METHODS:
        frame = frame.f_back
    return frame


def check_wrappers(env: VecEnv | None) -> None:
    """Refuse wrappers whose observations are of another shape or type than those inside, or are no row of integers.

    Raises:
        ValueError: If there is one, which it names.
    """
    inner = env
    while isinstance(inner, VecEnvWrapper):
        changed = inner.observation_space
        if changed != inner.venv.observation_space:
            name = type(inner).__name__
            raise ValueError(
                f"Expected the observations of the env inside {name}, {inner.venv.observation_space}, got {changed}: a "
                f"language model would read them as a text of their own. Leave {name} out; an observation has the "
                "whole text so far."
            )
        inner = inner.venv
    space = None if inner is None else inner.observation_space
    is_row = isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.integer)
    if space is not None and not is_row:
        raise ValueError(
            f"Expected observations of token ids, (L,), as a TextEnv returns them, got {space!s:.200} from "
            f"{_names(env)}: leave out the wrapper that changes them."
        )


def check_observations(env: VecEnv | None, observations: Any) -> None:
    """Refuse observations at the start of a rollout that cannot be those of a `TextEnv`, and name the wrappers.

    Args:
        env: The env of the algorithm.
        observations: Its observations, (B, L) for a `TextEnv`.

    Raises:
        ValueError: If some wrapper has changed them.
    """
    check_wrappers(env)
    if observations is None:  # before the first reset
        return
    rows = np.asarray(observations)
    what = f"{rows.dtype} of shape {rows.shape}"
    if rows.ndim == 2 and np.issubdtype(rows.dtype, np.integer):
        is_padding = rows == PADDING
        has_one_separator = (rows == SEPARATOR).sum(axis=1) == 1
        wrong = np.flatnonzero(~has_one_separator | (is_padding[:, :-1] & ~is_padding[:, 1:]).any(axis=1))
        if len(wrong) == 0:
            return
        what = f"{rows[wrong[0]].tolist()} in row {wrong[0]}"
    raise ValueError(
        f"Expected observations of token ids as a TextEnv returns them (a prompt, {SEPARATOR}, later tokens, then "
        f"{PADDING}), got {what} from {_names(env)}: leave out the wrapper that changes them. VecNormalize needs "
        "norm_obs=False."
    )


def _names(env: VecEnv | None) -> str:
    """Return the classes of an env and its wrappers, as VecNormalize<DummyVecEnv<Monitor<TextEnv instance>>>."""
    if isinstance(env, VecEnvWrapper):
        return f"{type(env).__name__}<{_names(env.venv)}>"
    assert env is not None, "observations come from an env"
    return f"{type(env).__name__}{env.env_method('__str__', indices=[0])[0]}"  # gymnasium puts brackets around a name
