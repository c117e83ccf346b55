"""The episodes whose score has come since the last rollout, for callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from ..rollout.vec_env import TextVecEnv


class ScoredEpisodes:
    """Collects the infos of episodes that have ended, and returns those whose score has come.

    Args:
        env: The env that the model trains on.
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env.unwrapped
        self.infos: list[dict[str, Any]] = []

    def see(self, infos: Iterable[dict[str, Any]]) -> None:
        """Collect the infos of a step, (B,)."""
        self.infos += [info for info in infos if "end_reason" in info]

    def take(self) -> list[dict[str, Any]]:
        """Return, at a rollout's end, the infos of the episodes scored since the last call, dropped ones included."""
        # `LateScores` has added scores to the infos since `see`, except to episodes that wait for their group.
        infos = [info for info in self.infos if info["scored"]]
        self.infos = [info for info in self.infos if not info["scored"]]
        if isinstance(self.env, TextVecEnv) and self.env.record.is_kept:
            # The env's record also has episodes that waited in a checkpoint, but none that were dropped.
            dropped = [info for info in infos if info["dropped"]]
            infos, self.infos = [*self.env.record.scored.values(), *dropped], []
        return infos
