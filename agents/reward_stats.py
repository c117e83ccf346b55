"""Mean and spread of a reward model's scores, kept beside its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

FILE = "reward_stats.json"


class RewardStats(NamedTuple):
    """What makes scores comparable: (score - mean) / std has mean 0 and spread 1 on the training texts.

    Args:
        mean: Of the scores.
        std: Of the scores, above 0.

    Example:
        >>> from agents.reward_stats import RewardStats
        >>> RewardStats(mean=2.0, std=4.0).normalised(10.0)
        2.0
    """

    mean: float
    std: float

    def normalised(self, score: float) -> float:
        """Return a score in units of the spread around the mean."""
        return (score - self.mean) / self.std

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `reward_stats.json` into a folder that is there."""
        (Path(folder) / FILE).write_text(json.dumps(self._asdict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RewardStats:
        """Read `reward_stats.json` of a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If its spread is not above 0.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected {FILE} in the folder {folder}, got none: train_reward_model writes it; elsewhere write "
                'the mean and standard deviation of the scores there, as {"mean": 0.0, "std": 1.0}.'
            )
        stats = cls(**json.loads(path.read_text(encoding="utf-8")))
        if not stats.std > 0:
            raise ValueError(f"Expected `std` in {path} to be positive, got {stats.std}.")
        return stats
