"""How good a reward model is on comparisons: accuracy with its interval, and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # the normal distribution's 97.5 % point
N_BINS = 10


class RewardFigures(NamedTuple):
    """What was measured on held-out data.

    Args:
        loss: The training loss there, in nats a pair, or the mean squared error of labels.
        accuracy: The share of pairs in which the better text has the higher score; equal scores count one half.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
        calibration_error: The mean distance of sigmoid(score difference) from how often it is right (`calibration`);
            None for labels, whose scores are no log-odds.
        n_pairs: How many pairs.
    """

    loss: float
    accuracy: float
    low: float
    high: float
    calibration_error: float | None
    n_pairs: int


def pair_accuracy(margins: np.ndarray) -> float:
    """Return the share of score differences (N,), better less worse, that are positive; zero counts one half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share seen in `n` independent trials (Wilson, 1927).

    Example:
        >>> from agents.reward_figures import wilson_interval
        >>> [round(bound, 3) for bound in wilson_interval(0.8, 10)]
        [0.49, 0.943]
    """
    square = Z95**2 / n
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(max(share * (1 - share), 0.0) / n * Z95**2 + square**2 / 4) / (1 + square)
    return middle - half, middle + half


def calibration(margins: np.ndarray, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error of score differences (N,), better less worse (Guo et al., 2017, eq. 3).

    The model predicts the text with the higher score with confidence sigmoid(|difference|), between 1/2 and 1, and is
    right where the difference is positive. In bins of equal width the mean confidence is held against the share right.

    Example:
        >>> import numpy as np
        >>> from agents.reward_figures import calibration
        >>> even = np.log([3.0, 3.0, 3.0, 1 / 3])  # 75 % sure, and right in 75 %
        >>> round(calibration(even), 6), round(calibration(abs(even)), 6)
        (0.0, 0.25)
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(margins))


def figures(loss: float, margins: Sequence[np.ndarray], is_log_odds: bool) -> RewardFigures:
    """Sum up comparisons.

    Args:
        loss: The loss on them.
        margins: The score differences of each independent comparison: of the pairs of one ranking together. The
            interval counts a ranking as one trial, which is too wide rather than too narrow.
        is_log_odds: Whether the sigmoid of a difference is a probability.
    """
    every = np.concatenate(margins)
    accuracy = pair_accuracy(every)
    error = calibration(every) if is_log_odds else None
    return RewardFigures(loss, accuracy, *wilson_interval(accuracy, len(margins)), error, len(every))
