"""The mean and standard deviation of a reward model's scores, stored beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from textenv.checks.json_files import read_json

STATS_FILE = "reward_stats.json"


@dataclass(frozen=True)
class RewardStats:
    """Mean and standard deviation of a reward model's scores, stored in its folder as `reward_stats.json`.

    Args:
        mean: The mean of the scores on held-out texts.
        std: The standard deviation of the scores.

    Raises:
        ValueError: If a number is not finite, or `std` is not positive.

    Example:
        >>> RewardStats.of([1.0, 3.0])
        RewardStats(mean=2.0, std=1.0)
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        # A std of 0, of equal scores, would divide by 0; a nan would reach every reward.
        if not (np.isfinite(self.mean) and np.isfinite(self.std) and self.std > 0):
            raise ValueError(f"Expected a finite mean and a positive std, got {self.mean} and {self.std}.")

    def normalised(self, score: float) -> float:
        """Return (score - mean) / std."""
        return (score - self.mean) / self.std

    @classmethod
    def of(cls, scores: Sequence[float]) -> RewardStats:
        """Return the statistics of scores, (N,)."""
        return cls(float(np.mean(scores)), float(np.std(scores)))  # numpy's std divides by N, not N - 1

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the statistics into the model's folder."""
        (Path(folder) / STATS_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> RewardStats:
        """Read the statistics from the model's folder.

        Raises:
            FileNotFoundError: If the folder has no such file.
            ValueError: If the file is damaged.
        """
        file = Path(folder) / STATS_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected {STATS_FILE} in the folder of the reward model, got none in {str(folder)!r}: give "
                "stats=RewardStats(mean, std), write it by RewardStats.of(scores).save(folder), or leave `stats` out."
            )
        stats = read_json(file, {"mean": float, "std": float})
        return cls(stats["mean"], stats["std"])
