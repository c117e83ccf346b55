"""The record of the episodes that end in a rollout, for the steps that run before returns are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from textenv.lanes.finished_episodes import Place


@dataclass
class RolloutRecord:
    """The infos of the episodes that ended in the current rollout, by place.

    Attributes:
        first_step: The rollout's first step, counted over all rollouts of the env, as in `Place`.
        is_kept: Whether episodes are recorded, as the steps that run before returns need.
        ended: The infos of the episodes that ended in the rollout, dropped episodes included.
        scored: The infos of the episodes whose score came in the rollout, without dropped episodes; some may have ended
            in an earlier rollout.
    """

    first_step: int
    is_kept: bool
    ended: dict[Place, dict[str, Any]] = field(default_factory=dict)
    scored: dict[Place, dict[str, Any]] = field(default_factory=dict)

    def add(self, place: Place, info: dict[str, Any], is_scored: bool) -> None:
        """Record an episode that has just ended, with or without its score."""
        if self.is_kept:
            self.ended[place] = info
            if is_scored and not info["dropped"]:
                self.scored[place] = info

    def row_of(self, place: Place) -> int | None:
        """Return the row of the buffer's arrays in which an episode ended; None if it ended in an earlier rollout."""
        row = place[0] - self.first_step
        return row if row >= 0 else None
