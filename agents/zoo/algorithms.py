"""PPO and MaskablePPO with the settings of `make_agent`, as classes for programs that need a class (rl_zoo3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from gymnasium import Env
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from textenv.lanes.finished_episodes import Place

from ..build import attach_steps, buffer_settings, settings_for
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.maskable_buffer import MaskableSequenceRolloutBuffer
from ..rollout.vec_env import TextVecEnv
from ..steps.step import text_vec_env


class _InLanes:
    """A mixin that gives both algorithms their lanes, buffer and settings; see `TokenPPO`."""

    _buffer_class: type[SequenceRolloutBuffer] = SequenceRolloutBuffer

    def __init__(
        self,
        policy: Any,
        env: VecEnv | Env[Any, Any] | None = None,
        n_minibatches: int | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        lanes = as_lanes(env)
        if lanes is not None:  # None if SB3 `BaseAlgorithm.load` has no env: it sets the saved attributes afterwards
            kwargs = _settings(type(self), lanes, n_minibatches, rollout_buffer_kwargs, kwargs)
        super().__init__(policy, lanes, rollout_buffer_class=self._buffer_class, **kwargs)  # type: ignore[call-arg]

    def _setup_model(self) -> None:
        super()._setup_model()  # type: ignore[misc]
        # SB3 `base_class.BaseAlgorithm.load` calls this, too, and perhaps without an env.
        if self.env is not None:  # type: ignore[attr-defined]
            attach_steps(cast("OnPolicyAlgorithm", self), text_vec_env(self.env))  # type: ignore[attr-defined]


class TokenPPO(_InLanes, PPO):
    """SB3's PPO with the lanes, buffer and settings of `make_agent`.

    Separate environments, as SB3's `make_vec_env` makes them, are replaced by lanes of the first of them: that takes
    one reward call per step, and one forward per sequence in the update. Training, saving and loading are PPO's own.

    Args:
        policy: `LMPolicy`, or a subclass.
        env: A `TextVecEnv`, a `TextEnv`, or a DummyVecEnv of `TextEnv`s; None if a file is loaded without one.
        n_minibatches: The number of minibatches in an epoch, in place of `batch_size`.
        rollout_buffer_kwargs: The buffer's arguments, as in `make_agent`.
        **kwargs: The other arguments of PPO.

    Raises:
        TypeError: If the environments are wrapped, or live in other processes.
        ValueError: If `n_minibatches` does not divide the rollout.

    Example:
        >>> from agents.zoo.policies import DemoPolicy
        >>> # TokenPPO(DemoPolicy, gymnasium.make("textenv/Demo-v0")).learn(1000)
    """


class TokenMaskablePPO(_InLanes, MaskablePPO):
    """sb3-contrib's MaskablePPO with the lanes, buffer and settings of `make_agent`; see `TokenPPO`."""

    _buffer_class = MaskableSequenceRolloutBuffer


def as_lanes(env: VecEnv | Env[Any, Any] | None) -> TextVecEnv | None:
    """Return as many lanes of the first environment as there are environments; None and a `TextVecEnv` stay.

    Raises:
        TypeError: If the environments are wrapped in more than a Monitor, or live in other processes.
    """
    if env is None or isinstance(env, TextVecEnv):
        return env
    if isinstance(env, VecEnv) and not isinstance(env, DummyVecEnv):
        raise TypeError(
            f"Expected environments in this process and in no wrapper, got {type(env).__name__}: their lanes share one "
            "of them. In rl_zoo3 leave out --vec-env, normalize, frame_stack and vec_env_wrapper."
        )
    envs = env.envs if isinstance(env, DummyVecEnv) else [env]
    first, writers = envs[0], [_writer(env) for env in envs]
    while isinstance(first, Monitor):  # SB3 `monitor.Monitor.step` adds info["episode"], as lanes do themselves
        first = first.env
    return _MonitoredLanes(first, writers)


class _MonitoredLanes(TextVecEnv):
    """Lanes that write each episode into the file of the Monitor that they replace, for rl_zoo3's plots."""

    def __init__(self, env: Env[Any, Any], writers: Sequence[ResultsWriter | None]) -> None:
        super().__init__(env, len(writers))
        self.writers = writers

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, dones, infos = super().step_wait()
        for lane in np.flatnonzero(dones).tolist():
            if not self.defers_scores:  # an episode with a late score is written by `score_unscored`
                self._write(lane, infos[lane])
        return observations, rewards, dones, infos

    def score_unscored(self) -> Sequence[tuple[Place, dict[str, Any], float]]:
        scores = super().score_unscored()
        for (_, lane), info, _ in scores:
            self._write(lane, info)
        return scores

    def _write(self, lane: int, info: dict[str, Any]) -> None:
        writer = self.writers[lane]
        if writer is not None and not info["dropped"]:
            # The columns of SB3 `monitor.ResultsWriter`: reward, length in tokens, seconds since the start.
            writer.write_row({name: info["episode"][name] for name in ("r", "l", "t")})


def _writer(env: Env[Any, Any]) -> ResultsWriter | None:
    return env.results_writer if isinstance(env, Monitor) else None


def _settings(
    algorithm: type, lanes: TextVecEnv, n_minibatches: int | None, buffer: dict[str, Any] | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of the algorithm: the settings of `make_agent`, overridden by `kwargs`."""
    if issubclass(algorithm, MaskablePPO):
        lanes.env.check_mask()
    settings = {
        **settings_for(algorithm, lanes, {**kwargs, "rollout_buffer_kwargs": buffer}),
        **kwargs,
        "rollout_buffer_kwargs": buffer_settings(lanes, buffer),
    }
    if n_minibatches is not None:
        rollout = settings["n_steps"] * lanes.num_envs
        if n_minibatches < 1 or rollout % n_minibatches != 0:
            raise ValueError(
                f"Expected `n_minibatches` to divide n_steps * n_envs = {rollout}, got {n_minibatches}: each epoch has "
                "as many minibatches of about equal size."
            )
        settings["batch_size"] = rollout // n_minibatches
    return settings
