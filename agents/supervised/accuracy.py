"""Accuracy, its confidence interval and the calibration of a reward model on comparisons of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # the normal distribution's 97.5 % point
N_BINS = 10  # of confidence, a few comparisons in each where a held-out set has a few hundred


class RewardFigures(NamedTuple):
    """The figures of a reward model on held-out data.

    Args:
        loss: The loss that training minimises: nats a pair, or the mean squared error of labels.
        accuracy: The share of pairs in which the better text has the higher score; equal scores count one half.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
        calibration_error: The mean distance between sigmoid(score difference) and the share of pairs in the right order
            (`calibration`); None for labels, whose scores are no log-odds.
        n_pairs: The number of pairs.
    """

    loss: float
    accuracy: float
    low: float
    high: float
    calibration_error: float | None
    n_pairs: int


def pair_accuracy(margins: np.ndarray) -> float:
    """Return the share of score differences (N,), better less worse, that are positive; zero counts one half.

    Example:
        >>> import numpy as np
        >>> from agents.supervised.accuracy import pair_accuracy
        >>> pair_accuracy(np.array([1.5, 0.0, -1.0, 2.0]))
        0.625
    """
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval, low and high, of a share seen in `n` independent trials (Wilson, 1927).

    `scipy.stats.binomtest` has it for whole numbers of successes alone; here ties count one half.

    Example:
        >>> from agents.supervised.accuracy import wilson_interval
        >>> [round(bound, 3) for bound in wilson_interval(0.8, 10)]
        [0.49, 0.943]
    """
    square = Z95**2 / n
    middle = (share + square / 2) / (1 + square)  # drawn towards one half, the more the fewer trials
    half = math.sqrt(max(share * (1 - share), 0.0) / n * Z95**2 + square**2 / 4) / (1 + square)
    return middle - half, middle + half


def calibration(margins: np.ndarray, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error of score differences (N,), better less worse (Guo et al., 2017, eq. 3).

    The model predicts that the text with the higher score is the better one, with confidence sigmoid(|difference|),
    between 1/2 and 1; it is right where the difference is positive, and half right where it is zero. In each of
    `n_bins` bins of equal width the mean confidence is compared with the share right; the error is the mean of these
    distances over all comparisons.

    scikit-learn's `calibration_curve` does not serve: it refuses outcomes of one half, and returns no counts, with
    which the bins have to be weighted.

    Example:
        >>> import numpy as np
        >>> from agents.supervised.accuracy import calibration
        >>> even = np.log([3.0, 3.0, 3.0, 1 / 3])  # 75 % sure, and right in 75 %
        >>> round(calibration(even), 6), round(calibration(abs(even)), 6)
        (0.0, 0.25)
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=n_bins)  # (n_bins,): sums, so weighted by counts
    return float(np.abs(gaps).sum() / len(margins))


def figures(loss: float, margins: Sequence[np.ndarray], is_log_odds: bool) -> RewardFigures:
    """Return the figures of comparisons.

    Args:
        loss: The loss on them.
        margins: The score differences, better less worse, of each ranking: an array (pairs,) a ranking. The interval
            counts a ranking as one trial, since its pairs depend on each other: too wide rather than too narrow.
        is_log_odds: Whether the sigmoid of a difference is a probability, so that calibration means something.
    """
    differences = np.concatenate(margins)  # (pairs of all rankings,)
    accuracy = pair_accuracy(differences)
    error = calibration(differences) if is_log_odds else None
    return RewardFigures(loss, accuracy, *wilson_interval(accuracy, len(margins)), error, len(differences))
