"""A `TextEnv` in N lanes as a Stable-Baselines3 VecEnv: a thin adapter over the array core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, tile_images

from textenv.finished import Place
from textenv.lanes import Lanes
from textenv.printable import printable
from textenv.rendering import picture, render_row
from textenv.vector import unwrap_text_env

from .distributed import world
from .observations import TerminalObservation


class TextVecEnv(VecEnv):
    """N episodes of one `TextEnv` side by side, each refilled in the step that ends it, for SB3's algorithms.

    The hooks of `env` serve all lanes, in one reward call a step; nothing is pickled into processes. It writes the
    `episode` entry of a finished episode's info itself, so it wants no Monitor.

    Args:
        env: A `TextEnv`, a subclass, or what `gym.make` made of one.
        n_envs: The number of lanes. Several processes share them: each has as many, and every w-th prompt.

    Raises:
        TypeError: If `env` is no `TextEnv`, is wrapped in something that changes it, or overrides `step` or `reset`.
        ValueError: If the lanes cannot be shared evenly.

    Example:
        >>> from agents import TextVecEnv
        >>> from textenv import CharTokenizer, TextEnv
        >>> env = TextEnv(["a"], CharTokenizer(), reward=lambda prompt, preds, done: 1.0, max_new_tokens=2)
        >>> vec_env = TextVecEnv(env, n_envs=3)
        >>> vec_env.reset().shape
        (3, 4)
    """

    def __init__(self, env: gym.Env[Any, Any], n_envs: int) -> None:
        self.env = unwrap_text_env(env)
        self.world = world()
        if self.world is not None:
            if n_envs % self.world.size != 0:
                raise ValueError(f"Expected n_envs to divide by the {self.world.size} processes, got {n_envs}.")
            n_envs //= self.world.size
        self.lanes = Lanes(self.env, n_envs)
        if self.world is not None:
            self.lanes.dealer.shard = (self.world.rank, self.world.size)
        self.keeps_infos = False
        self.begin_rollout(keep_infos=False)
        super().__init__(n_envs, self.env.observation_space, self.env.action_space)

    def reset(self) -> np.ndarray:
        """Begin new episodes in all lanes, scored as they end, and return the observations, (B, L).

        The seed given to `seed` starts the prompts' order anew. `set_options({"prompts": rows})` runs these rows, each
        exactly once over all lanes.
        """
        seed, options = self._seeds[0], self._options[0]
        self._reset_seeds()
        self._reset_options()
        # An evaluation may follow; a rollout asks for both again.
        self.lanes.defer_scores = self.lanes.accepts_dropped = False
        self.begin_rollout(keep_infos=False)
        order_seed = None
        if seed is None and self.world is not None and self.lanes.dealer.cursor is None:
            seed = self.world.seed  # the same order in all processes
        if seed is not None:  # as `TextEnv.reset` does: the order, and what the hooks draw from `self.np_random`
            self.env.np_random = seeding.np_random(int(seed))[0]
            order_seed = int(self.env.np_random.integers(2**31))
            if self.world is not None and self.world.rank > 0:
                self.env.np_random = seeding.np_random(int(seed) + self.world.rank)[0]
        return self.lanes.reset(order_seed, options.get("prompts"))

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions, (B,), for `step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Return observations (B, L), rewards (B,) float32, dones (B,) and infos; see `TextEnv.step`."""
        step = self.lanes.n_steps
        result = self.lanes.step(self._actions)
        final = dict(result.final_observations)
        cut = [lane for lane in final if result.truncated[lane]]
        if cut:
            final.update(zip(cut, TerminalObservation.of_step([final[lane] for lane in cut]), strict=True))
        for lane, observation in final.items():
            result.infos[lane]["terminal_observation"] = observation
            result.infos[lane]["TimeLimit.truncated"] = bool(result.truncated[lane])
            if self.keeps_infos:
                self.ended[step, lane] = result.infos[lane]
                if not self.lanes.defer_scores and not result.infos[lane]["dropped"]:
                    self.scored[step, lane] = result.infos[lane]
        dones = result.terminated | result.truncated
        return result.observations, result.rewards.astype(np.float32), dones, result.infos

    def close(self) -> None:
        """Close the env whose hooks serve all lanes."""
        self.env.close()

    def render(self, mode: str | None = None) -> Any:
        """Return the lanes as a list of texts; print them ("human"), or draw them, as one picture ("rgb_array")."""
        if (mode or self.render_mode) == "rgb_array":
            return tile_images(self.get_images())
        texts = self._texts()
        if (mode or self.render_mode) != "human":
            return texts
        print(printable("\n".join(texts)))
        return None

    def get_images(self) -> list[np.ndarray]:
        """Return a picture of each lane, (H, W, 3) uint8."""
        return [picture(text) for text in self._texts()]

    def _texts(self) -> list[str]:
        return [render_row(self.env.tokenizer, row) for row in self.lanes.tokens]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the env, once for each lane asked for."""
        if attr_name == "action_masks":  # the lanes', not the env's own row's
            self.env.check_mask()
            return [lambda lane=lane: self.lanes.allowed()[lane] for lane in self._get_indices(indices)]
        value = getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the env; it serves all lanes, so `indices` must be None."""
        if indices is not None:
            raise ValueError("Expected `indices` to be None: all lanes share one TextEnv.")
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the env, once for each lane asked for; `action_masks` looks at the lanes, all at once."""
        if method_name == "action_masks":
            self.env.check_mask()
            allowed = self.lanes.allowed()  # (B, V)
            return [allowed[lane] for lane in self._get_indices(indices)]
        method = getattr(self.env, method_name)
        return [method(*method_args, **method_kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Return whether the lanes do what a wrapper does: true of Monitor alone."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def begin_rollout(self, keep_infos: bool = True) -> None:
        """Keep the infos of the episodes that end from now on, for the steps before returns: by place in `ended`.

        `scored` has those whose score has come since, which may have ended before; not those that were dropped.
        Calling it twice does no harm.
        """
        self.keeps_infos = keep_infos
        self.first_step = self.lanes.n_steps
        self.ended: dict[Place, dict[str, Any]] = {}
        self.scored: dict[Place, dict[str, Any]] = {}

    def defer_scores(self) -> None:
        """Let finished episodes wait for `score_unscored` from now on; forget those of a rollout broken off."""
        self.lanes.defer_scores = True
        self.lanes.unscored.clear()

    def accept_dropped(self) -> None:
        """Let the reward drop episodes from now on, until `reset`: for who leaves them out of training."""
        self.lanes.accepts_dropped = True

    def score_unscored(self) -> Sequence[tuple[Place, dict[str, Any], float]]:
        """Score the finished episodes that wait and whose group is whole, in one call; see `Lanes.score_unscored`."""
        scores = self.lanes.score_unscored()
        self.scored.update((place, info) for place, info, _ in scores if not info["dropped"])
        return scores

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the running episodes and the prompts' order: arrays, and what goes into JSON."""
        arrays, meta = self.lanes.state_dict()
        own = {"np_random": self.env.np_random.bit_generator.state, "failures": self.env.failures.state_dict()}
        return arrays, {**meta, **own}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> np.ndarray:
        """Go on from what `state_dict` returned; return the observations, (B, L)."""
        observations = self.lanes.load_state_dict(arrays, meta)
        self.env.np_random.bit_generator.state = meta["np_random"]
        if "failures" in meta:  # checkpoints of before have none
            self.env.failures.load_state_dict(meta["failures"])
        return observations
