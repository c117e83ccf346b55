"""PPO as `make_agent` sets it up, as classes: for programs that build an algorithm by its name, as rl_zoo3."""

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

from textenv.finished import Place

from .buffers import SequenceRolloutBuffer
from .build import attach_steps, buffer_settings, settings_for
from .maskable_buffer import MaskableSequenceRolloutBuffer
from .rollout_steps import text_vec_env
from .vec_env import TextVecEnv


class _InLanes:
    """What both algorithms do beside SB3's: see `TokenPPO`."""

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
        if lanes is not None:
            kwargs = _settings(type(self), lanes, n_minibatches, rollout_buffer_kwargs, kwargs)
        super().__init__(policy, lanes, rollout_buffer_class=self._buffer_class, **kwargs)  # type: ignore[call-arg]

    def _setup_model(self) -> None:
        super()._setup_model()  # type: ignore[misc]
        if self.env is not None:  # type: ignore[attr-defined]
            attach_steps(cast("OnPolicyAlgorithm", self), text_vec_env(self.env))  # type: ignore[attr-defined]


class TokenPPO(_InLanes, PPO):
    """SB3's PPO with lanes, buffer and settings of `make_agent`.

    Environments that were made one by one, as SB3's `make_vec_env` does, become the lanes of the first of them: one
    reward call a step, and one forward a sequence in the update. It trains as PPO does, which is unmodified, and saves
    and loads as it.

    Args:
        policy: `LMPolicy`, or a subclass.
        env: A `TextVecEnv`, a `TextEnv`, or a DummyVecEnv of them; None while a file is loaded without one.
        n_minibatches: In place of `batch_size`: the minibatches of an epoch.
        rollout_buffer_kwargs: As in `make_agent`.
        **kwargs: The other arguments of PPO.

    Raises:
        TypeError: For environments that are wrapped, or in other processes.

    Example:
        >>> from agents.demo_policies import DemoPolicy
        >>> # TokenPPO(DemoPolicy, gymnasium.make("textenv/Demo-v0")).learn(1000)
    """


class TokenMaskablePPO(_InLanes, MaskablePPO):
    """sb3-contrib's MaskablePPO with lanes, buffer and settings of `make_agent`; see `TokenPPO`."""

    _buffer_class = MaskableSequenceRolloutBuffer


def as_lanes(env: VecEnv | Env[Any, Any] | None) -> TextVecEnv | None:
    """Return the lanes of the first of some environments, as many as they are.

    Raises:
        TypeError: If they are wrapped in more than a Monitor, or in other processes.
    """
    if env is None or isinstance(env, TextVecEnv):
        return env
    if isinstance(env, VecEnv) and not isinstance(env, DummyVecEnv):
        raise TypeError(
            f"Expected environments in this process and in no wrapper, got {type(env).__name__}: their lanes share one "
            "of them. In rl_zoo3 leave out --vec-env, normalize, frame_stack and vec_env_wrapper."
        )
    envs = env.envs if isinstance(env, DummyVecEnv) else [env]
    one, writers = envs[0], [_writer(each) for each in envs]
    while isinstance(one, Monitor):  # what it adds to infos the lanes write themselves
        one = one.env
    return _MonitoredLanes(one, writers)


class _MonitoredLanes(TextVecEnv):
    """Lanes that write the episodes' rows into the files of the Monitors in whose place they stand."""

    def __init__(self, env: Env[Any, Any], writers: Sequence[ResultsWriter | None]) -> None:
        super().__init__(env, len(writers))
        self.writers = writers

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, dones, infos = super().step_wait()
        for lane in np.flatnonzero(dones).tolist():
            if not self.defers_scores:  # else the reward is not known yet
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
            writer.write_row({name: info["episode"][name] for name in ("r", "l", "t")})


def _writer(env: Env[Any, Any]) -> ResultsWriter | None:
    return env.results_writer if isinstance(env, Monitor) else None


def _settings(
    algorithm: type, lanes: TextVecEnv, n_minibatches: int | None, buffer: dict[str, Any] | None, given: dict[str, Any]
) -> dict[str, Any]:
    if issubclass(algorithm, MaskablePPO):
        lanes.env.check_mask()
    settings = {
        **settings_for(algorithm, lanes, given),
        **given,
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
