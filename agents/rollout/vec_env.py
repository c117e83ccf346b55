"""The Stable-Baselines3 VecEnv of N lanes of one `TextEnv`: a thin adapter over the array core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, tile_images

from textenv.lanes.finished_episodes import Place
from textenv.lanes.lanes import Lanes
from textenv.lanes.rendering import picture, render_row
from textenv.prompts.priority import PriorityCursor
from textenv.text.printable import printable
from textenv.vector import unwrap_text_env

from ..distributed.collectives import gather
from ..distributed.hangs import note_progress
from ..distributed.world import world
from ..policies.tensor_notes import TerminalObservation
from .rollout_record import RolloutRecord


class TextVecEnv(VecEnv):
    """N episodes of one `TextEnv` side by side, for SB3's algorithms; the step that ends an episode begins the next.

    The hooks of `env` serve all lanes, in one reward call per step, in this process. Infos of finished episodes have
    the entry `episode`, so that no Monitor is needed.

    Args:
        env: A `TextEnv`, a subclass, or the result of `gym.make` for one.
        n_envs: The number of lanes. W processes of a job have n_envs / W lanes and every W-th prompt each.

    Raises:
        TypeError: If `env` is no `TextEnv`, if a wrapper changes it, or if it overrides `step` or `reset`.
        ValueError: If the number of processes does not divide the number of lanes.

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
        self.record = RolloutRecord(self.lanes.n_steps, is_kept=False)
        super().__init__(n_envs, self.env.observation_space, self.env.action_space)

    def reset(self) -> np.ndarray:
        """Begin new episodes in all lanes, scored as they end, and return the observations, (B, L) int64.

        After a call of `seed`, the prompts' order starts anew. After `set_options({"prompts": rows})` the lanes run
        these rows, each exactly once.
        """
        seed, options = self._seeds[0], self._options[0]
        self._reset_seeds()
        self._reset_options()
        # An evaluation may follow; the steps of a rollout ask for deferred scores, dropped episodes and a record again.
        self.lanes.end_rollout()
        self.record = RolloutRecord(self.lanes.n_steps, is_kept=False)
        order_seed = None
        if seed is None and self.world is not None and self.lanes.dealer.cursor is None:
            seed = self.world.seed  # the same order in all processes
        # As in `TextEnv.reset`, the seed decides the order of prompts and what hooks draw from `self.np_random`; the
        # draws of hooks differ between processes.
        if seed is not None:
            self.env.np_random = seeding.np_random(int(seed))[0]
            order_seed = int(self.env.np_random.integers(2**31))
            if self.world is not None and self.world.rank > 0:
                self.env.np_random = seeding.np_random(int(seed) + self.world.rank)[0]
        return self.lanes.reset(order_seed, options.get("prompts"))

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions, (B,) token ids, for `step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Return observations (B, L) int64, rewards (B,) float32, dones (B,) bool and infos; see `TextEnv.step`.

        The info of a finished episode has `terminal_observation` and `TimeLimit.truncated`, from which SB3
        `on_policy_algorithm.collect_rollouts` adds the value of a truncated episode's end to its reward.
        """
        note_progress()
        step = self.lanes.n_steps
        result = self.lanes.step(self._actions)
        final = dict(result.final_observations)
        truncated = [lane for lane in final if result.truncated[lane]]
        if truncated:
            rows = TerminalObservation.of_step([final[lane] for lane in truncated])
            final.update(zip(truncated, rows, strict=True))
        for lane, observation in final.items():
            result.infos[lane]["terminal_observation"] = observation
            result.infos[lane]["TimeLimit.truncated"] = bool(result.truncated[lane])
            self.record.add((step, lane), result.infos[lane], is_scored=not self.defers_scores)
        dones = result.terminated | result.truncated
        # `astype` copies: SB3 adds to these rewards in place.
        return result.observations, result.rewards.astype(np.float32), dones, result.infos

    def close(self) -> None:
        """Close the env whose hooks serve all lanes."""
        self.env.close()

    def render(self, mode: str | None = None) -> Any:
        """Return the lanes as a list of texts ("ansi") or as one picture ("rgb_array"), or print them ("human")."""
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
        # sb3-contrib `maskable/utils.is_masking_supported` asks for it; the env's own method masks its single row.
        if attr_name == "action_masks":
            self.env.check_mask()
            return [lambda lane=lane: self.lanes.allowed()[lane] for lane in self._get_indices(indices)]
        value = getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the env for all lanes.

        Raises:
            ValueError: If `indices` is not None.
        """
        if indices is not None:
            raise ValueError("Expected `indices` to be None: all lanes share one TextEnv.")
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the env once for each lane asked for; `action_masks` returns the lanes' masks, (V,) each."""
        if method_name == "action_masks":
            self.env.check_mask()
            allowed = self.lanes.allowed()  # (B, V)
            return [allowed[lane] for lane in self._get_indices(indices)]
        method = getattr(self.env, method_name)
        return [method(*method_args, **method_kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Return True for Monitor alone: infos have its entries, and SB3 `evaluation.evaluate_policy` asks for it."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def begin_rollout(self, defer_scores: bool = False, accept_dropped: bool = False) -> None:
        """Record the episodes that end from now on in `record`, for the steps that run before returns.

        Each of these steps calls it when a rollout begins, with the options that it needs; a further call keeps what
        earlier calls have switched on. `reset` switches everything off.

        Args:
            defer_scores: Let finished episodes wait for `score_unscored`, and forget those of a rollout that was broken
                off.
            accept_dropped: Let the reward drop episodes, which the caller then leaves out of training.
        """
        self.record = RolloutRecord(self.lanes.n_steps, is_kept=True)
        self.lanes.begin_rollout(defer_scores, accept_dropped)

    def agree_on_prompts(self) -> None:
        """Bring the table of an order by priority up to date with the draws and rewards of all processes.

        All processes must call it: `DataParallel` does so before each rollout. Nothing happens with one process or
        another order.
        """
        cursor = self.lanes.dealer.cursor
        if self.world is not None and isinstance(cursor, PriorityCursor):
            cursor.agree(gather("the draws of prompts", cursor.news()))

    @property
    def defers_scores(self) -> bool:
        """Whether finished episodes wait for `score_unscored`."""
        return self.lanes.defer_scores

    def score_unscored(self) -> Sequence[tuple[Place, dict[str, Any], float]]:
        """Score, in one call, the waiting episodes whose group is whole; see `Lanes.score_unscored`.

        Returns:
            The place, the info and the score of each.
        """
        scores = self.lanes.score_unscored()
        self.record.scored.update((place, info) for place, info, _ in scores if not info["dropped"])
        return scores

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the running episodes and the prompts' order, as arrays and as entries that fit JSON.

        With several processes and an order by priority, all must call it.
        """
        self.agree_on_prompts()
        arrays, meta = self.lanes.state_dict()
        own = {"np_random": self.env.np_random.bit_generator.state, "failures": self.env.failures.state_dict()}
        return arrays, {**meta, **own}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> np.ndarray:
        """Restore the state that `state_dict` returned, and return the observations, (B, L)."""
        observations = self.lanes.load_state_dict(arrays, meta)
        self.env.np_random.bit_generator.state = meta["np_random"]
        self.env.failures.load_state_dict(meta["failures"])
        return observations
