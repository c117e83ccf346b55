"""The episodes of all processes that got their score since the last rollout, for callbacks that log or check them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from stable_baselines3.common.vec_env import VecEnv

from ..distributed.collectives import gather
from ..rollout.vec_env import TextVecEnv

Facts = TypeVar("Facts")


class ScoredEpisodes:
    """Collects the infos of episodes that ended, and returns what a callback needs of them once they have a score.

    Args:
        env: The env that the model trains on.
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env.unwrapped
        self.infos: list[dict[str, Any]] = []

    def collect(self, infos: Iterable[dict[str, Any]]) -> None:
        """Collect the infos of a step, one per lane, of the lanes whose episode ended."""
        self.infos += [info for info in infos if "end_reason" in info]  # only final infos have the key

    def take(self, read: Callable[[dict[str, Any]], Facts]) -> list[Facts]:
        """Return, at a rollout's end, the facts of the episodes scored since the last call, dropped ones included.

        They are those of all processes, which must all call it: a figure of a rollout then does not depend on how many
        processes have shared it.

        Args:
            read: Returns, from the final info of an episode, what the callback needs of it. It is sent to all
                processes, so that it should be small, and hold no text.
        """
        by_rank = gather("the episodes of a rollout", [read(info) for info in self._take()])
        return [facts for of_rank in by_rank for facts in of_rank]

    def _take(self) -> list[dict[str, Any]]:
        # `LateScores` has added scores to the collected infos, except for episodes that wait for their group.
        infos = [info for info in self.infos if info["scored"]]
        self.infos = [info for info in self.infos if not info["scored"]]
        if isinstance(self.env, TextVecEnv) and self.env.record.is_kept:
            # The env's record replaces ours: it also has episodes that waited in a checkpoint, but no dropped ones.
            dropped = [info for info in infos if info["dropped"]]
            infos, self.infos = [*self.env.record.scored.values(), *dropped], []
        return infos
