"""The vector environment for Gymnasium: N episodes of one `TextEnv` side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from textenv.env import TextEnv
from textenv.lanes.lanes import Lanes
from textenv.lanes.rendering import MODES, picture, render_row
from textenv.text.printable import printable


class TextVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N episodes of one `TextEnv` side by side, with one call of the reward per step.

    A row whose episode ends begins the next episode in the same step (`AutoresetMode.SAME_STEP`); the last observation
    and info of the old episode are in `infos["final_obs"]` and `infos["final_info"]`, as in Gymnasium's
    `SyncVectorEnv`. The hooks of `env` serve all rows, and the rows share one order of prompts. The own episode of
    `env` is not touched.

    Spaces are those of `env`, batched: observations (B, L) int64, actions (B,), rewards (B,) float64.

    Args:
        env: A `TextEnv`, a subclass, or the result of `gym.make` for one.
        num_envs: The number of rows, B.

    Raises:
        TypeError: If `env` is no `TextEnv`, has a wrapper that changes it, or overrides `step` or `reset`.
        ValueError: If `num_envs` is not in [1, 65536].

    Example:
        >>> from textenv import CharTokenizer, TextEnv, TextVectorEnv
        >>> env = TextEnv(["a"], CharTokenizer(), reward=lambda prompt, preds, done: 1.0, max_new_tokens=2)
        >>> envs = TextVectorEnv(env, num_envs=3)
        >>> observations, infos = envs.reset(seed=0)
        >>> envs.step(np.array([1, 2, 3]))[1]
        array([1., 1., 1.])
    """

    metadata: dict[str, Any] = {
        "render_modes": list(MODES),
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(self, env: gym.Env[Any, Any], num_envs: int) -> None:
        self.env = unwrap_text_env(env)
        self.lanes = Lanes(self.env, num_envs)
        self.num_envs = num_envs
        self.render_mode = self.env.render_mode
        self.single_observation_space = self.env.observation_space
        self.single_action_space = self.env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)  # (B, L)
        self.action_space = batch_space(self.single_action_space, num_envs)  # (B,)

    @property
    def idle(self) -> np.ndarray:
        """Whether each row has no episode, (B,) bool, since the prompts passed to `reset` have run out."""
        return self.lanes.idle.copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes in all rows.

        Args:
            seed: The seed with which the order of prompts starts anew; None continues the order.
            options: `{"prompts": prompts}` runs these prompts, each exactly once, few or many; see `idle`.

        Returns:
            Observations, (B, L) int64, and an empty dict.
        """
        super().reset(seed=seed)
        if seed is not None:  # the hooks draw from the `np_random` of `self.env`, so it is seeded, too
            self.env.np_random = self.np_random
        order_seed = None if seed is None else int(self.np_random.integers(2**31))
        return self.lanes.reset(order_seed, (options or {}).get("prompts")), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Write one token in every row; see `TextEnv.step`.

        Args:
            actions: Token ids, (B,).

        Returns:
            Observations (B, L) int64, rewards (B,) float64, terminated (B,), truncated (B,), and infos.
        """
        result = self.lanes.step(actions)
        infos: dict[str, Any] = {}
        for lane, observation in result.final_observations.items():
            # Gymnasium's `VectorEnv._add_info` turns the infos of rows into arrays, with a mask `_key` for each key.
            infos = self._add_info(infos, {"final_obs": observation, "final_info": result.infos[lane]}, lane)
        return result.observations, result.rewards, result.terminated, result.truncated, infos

    @property
    def action_masks(self) -> Callable[[], np.ndarray]:
        """A function that returns which tokens each row may write next, (B, V) bool; see `TextEnv.action_masks`."""
        self.env.check_mask()
        return self.lanes.allowed

    def render(self) -> tuple[Any, ...] | None:
        """Return ("ansi"), draw ("rgb_array") or print ("human") every row."""
        texts = tuple(render_row(self.env.tokenizer, row) for row in self.lanes.tokens)
        if self.render_mode == "human":
            print(printable("\n".join(texts)))
            return None
        return tuple(map(picture, texts)) if self.render_mode == "rgb_array" else texts


def make_vector_env(num_envs: int, env_type: str = "textenv.env:TextEnv", **kwargs: Any) -> TextVectorEnv:
    """Return `TextVectorEnv(TextEnv(**kwargs), num_envs)`; `gym.make_vec("textenv/Text-v0", ...)` calls it.

    Args:
        num_envs: The number of rows.
        env_type: The "module:Class" of the environment.
        **kwargs: The arguments of the class.
    """
    create = cast(type[TextEnv], load_env_creator(env_type))
    return TextVectorEnv(create(**kwargs), num_envs)


def unwrap_text_env(env: Any) -> TextEnv:
    """Return the `TextEnv` inside the result of `gym.make`; refuse wrappers and methods that N rows would ignore.

    Raises:
        TypeError: See `TextVectorEnv`.
    """
    # gymnasium `envs/registration.make` adds these two wrappers, which check calls and change nothing.
    while isinstance(env, (PassiveEnvChecker, OrderEnforcing)):
        env = env.env
    if isinstance(env, gym.Wrapper):
        raise TypeError(
            f"Expected a TextEnv without wrappers, got one inside {type(env).__name__}, which the array core would "
            "bypass. Pass env.unwrapped, and put what the wrapper does into `get_reward`."
        )
    if not isinstance(env, TextEnv):
        raise TypeError(f"Expected a TextEnv, got {type(env).__name__}.")
    for method in ("step", "reset"):
        if getattr(type(env), method) is not getattr(TextEnv, method):
            raise TypeError(
                f"{type(env).__name__} overrides `{method}`, which N rows in arrays never call. Put the reward into "
                "`get_reward` or `get_rewards`, memory into `preds.state`, and another speaker into `respond`."
            )
    return env
