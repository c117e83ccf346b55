"""The episodes that end in a rollout, as the environment records them for the steps that run before returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from textenv.lanes.finished_episodes import Place


@dataclass
class RolloutRecord:
    """The infos of the episodes that ended in the current rollout, by place.

    Attributes:
        first_step: The rollout's first step, counted as in `Place`: over all rollouts of the env.
        is_kept: Whether episodes are recorded; a step that runs before returns asks for it.
        ended: The infos of the episodes that ended in the rollout, dropped ones among them.
        scored: The infos of the episodes whose score has come in the rollout; some of them may have ended before it.
            Dropped ones are not among them.
    """

    first_step: int
    is_kept: bool
    ended: dict[Place, dict[str, Any]] = field(default_factory=dict)
    scored: dict[Place, dict[str, Any]] = field(default_factory=dict)

    def add(self, place: Place, info: dict[str, Any], is_scored: bool) -> None:
        """Record an episode that has just ended, with its score or still without."""
        if self.is_kept:
            self.ended[place] = info
            if is_scored and not info["dropped"]:
                self.scored[place] = info

    def row_of(self, place: Place) -> int | None:
        """Return the row of the buffer's arrays in which an episode ended; None where that was an earlier rollout."""
        row = place[0] - self.first_step
        return row if row >= 0 else None
