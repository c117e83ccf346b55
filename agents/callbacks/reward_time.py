"""The share of a run's time that its reward takes."""

from __future__ import annotations

import time

from textenv.lanes.lanes import Lanes


class RewardShare:
    """Measures the time that reward calls took since this object was made.

    Args:
        lanes: The episodes whose reward calls are timed.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        # `monotonic` never jumps, unlike the wall clock.
        self.started, self.seconds_before = time.monotonic(), lanes.reward_calls.seconds

    @property
    def seconds(self) -> float:
        """The seconds in reward calls."""
        return self.lanes.reward_calls.seconds - self.seconds_before

    @property
    def share(self) -> float:
        """The share of the whole time since then, 0 to 1."""
        passed = time.monotonic() - self.started
        return self.seconds / passed if passed > 0 else 0.0
