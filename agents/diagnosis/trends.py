"""The trends that the rules read from a run's figures: where a figure begins and ends, and whether the reward rose."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .run_files import RunRecord

FIRST, LAST = 0.1, 0.25  # the shares of a run's rows that count as its beginning and its end
MIN_ROWS = 4  # rows of metrics.jsonl below which a run has no trend
EQUAL_REWARDS = 1e-9  # a deviation of rewards that is rounding, which leaves 1e-17 between equal ones
# The rise that counts, in standard deviations of the rewards of the first rollouts' texts, and in standard errors.
RISE, SIGMAS = 0.25, 3.0


class Trend(NamedTuple):
    """The means of a figure over the first and the last rows of a run; NaN without enough rows.

    Attributes:
        first: The mean of the first tenth of the rows, two at least.
        last: The mean of the last quarter, two at least.
        noise: The standard error of the difference of the two, from the differences of neighbouring rows.
    """

    first: float
    last: float
    noise: float

    @property
    def change(self) -> float:
        """The last mean minus the first."""
        return self.last - self.first


def trend(values: np.ndarray) -> Trend:
    """Return the trend of a figure's values in the order of the rows, (N,).

    Example:
        >>> trend(np.array([0.0, 0.0, 1.0, 1.0])).change
        1.0
    """
    if len(values) < MIN_ROWS:
        return Trend(np.nan, np.nan, np.nan)
    n_first, n_last = (max(2, round(share * len(values))) for share in (FIRST, LAST))
    # Neighbouring rows share their trend, so that their differences are noise: of twice the variance of one row.
    deviation = float(np.sqrt(np.mean(np.diff(values) ** 2) / 2))
    noise = deviation * (1 / n_first + 1 / n_last) ** 0.5
    return Trend(float(values[:n_first].mean()), float(values[-n_last:].mean()), noise)


def second_half(values: np.ndarray) -> np.ndarray:
    """Return the values of the second half of the rows."""
    return values[len(values) // 2 :]


class RewardTrend(NamedTuple):
    """How the task reward went.

    Attributes:
        first: Its mean at first.
        last: Its mean at last.
        spread: The standard deviation of the rewards of single texts at first; 0 if it is unknown.
        noise: The standard error of the change.
    """

    first: float
    last: float
    spread: float
    noise: float

    @property
    def rose(self) -> bool:
        """Whether it rose by more than noise, and by a sizeable part of the spread."""
        return self.last - self.first > max(SIGMAS * self.noise, RISE * self.spread)

    @property
    def fell(self) -> bool:
        """Whether it fell by as much."""
        return self.first - self.last > max(SIGMAS * self.noise, RISE * self.spread)

    def __str__(self) -> str:
        return f"the reward went from {self.first:.3g} to {self.last:.3g}"


def reward_trend(record: RunRecord) -> RewardTrend:
    """Return the trend of the task reward of a run."""
    reward = trend(record.series("reward/task"))
    spreads = record.series("episode/reward_std")
    spread = float(spreads[: max(2, len(spreads) // 4)].mean()) if len(spreads) else 0.0
    return RewardTrend(reward.first, reward.last, spread, reward.noise)
