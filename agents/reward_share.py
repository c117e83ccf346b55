"""How much of a run's time its reward takes."""

from __future__ import annotations

import time

from textenv.lanes import Lanes


class RewardShare:
    """Measures from when it is made, by a clock that does not jump.

    Args:
        lanes: The episodes whose reward is meant.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.begun, self.seconds_then = time.monotonic(), lanes.reward_calls.seconds

    @property
    def seconds(self) -> float:
        """How long the reward has been waited for since."""
        return self.lanes.reward_calls.seconds - self.seconds_then

    @property
    def share(self) -> float:
        """Which share of the time since that is, 0 to 1."""
        passed = time.monotonic() - self.begun
        return self.seconds / passed if passed > 0 else 0.0
