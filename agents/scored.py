"""The episodes whose score has come, for who looks at them once a rollout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from .vec_env import TextVecEnv


class ScoredEpisodes:
    """Collects the infos of episodes that have ended, and gives those of which the score has come.

    Args:
        env: The env that the model trains on.
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env.unwrapped
        self.infos: list[dict[str, Any]] = []

    def see(self, infos: Iterable[dict[str, Any]]) -> None:
        """Take in the infos of a step."""
        self.infos += [info for info in infos if "end_reason" in info]

    def take(self) -> list[dict[str, Any]]:
        """Return, at a rollout's end, the infos of those scored since the last time, dropped ones among them."""
        # Read only now: late scores have been added to the infos in the meantime, save to those that wait for a group.
        infos = [info for info in self.infos if info["scored"]]
        self.infos = [info for info in self.infos if not info["scored"]]
        if isinstance(self.env, TextVecEnv) and self.env.record.is_kept:
            # The env has those too that waited in a checkpoint; not those that were dropped.
            dropped = [info for info in infos if info["dropped"]]
            infos, self.infos = [*self.env.record.scored.values(), *dropped], []
        return infos
