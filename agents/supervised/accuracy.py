"""The accuracy of a reward model on comparisons of texts, its confidence interval, and its calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # the 97.5 % point of the normal distribution
N_BINS = 10  # bins of confidence: a held-out set of a few hundred comparisons has some in each


class RewardFigures(NamedTuple):
    """The figures of a reward model on held-out data.

    Args:
        loss: The loss that training minimises: nats per pair, or the mean squared error of labels.
        accuracy: The share of pairs in which the better text has the higher score; equal scores count as one half.
        low: The lower bound of the accuracy's 95 % interval.
        high: The upper bound.
        calibration_error: The mean distance between sigmoid(score difference) and the share of pairs in the right order
            (`calibration`); None for labels, whose scores are not log-odds.
        n_pairs: The number of pairs.
    """

    loss: float
    accuracy: float
    low: float
    high: float
    calibration_error: float | None
    n_pairs: int


def pair_accuracy(margins: np.ndarray) -> float:
    """Return the share of score differences (N,), better minus worse, that are positive; zero counts as one half.

    Example:
        >>> import numpy as np
        >>> from agents import pair_accuracy
        >>> pair_accuracy(np.array([1.5, 0.0, -1.0, 2.0]))
        0.625
    """
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval, low and high, of a share seen in `n` independent trials (Wilson, 1927).

    `scipy.stats.binomtest` computes it for whole numbers of successes only; here a tie is half a success.

    Example:
        >>> from agents import wilson_interval
        >>> [round(bound, 3) for bound in wilson_interval(0.8, 10)]
        [0.49, 0.943]
    """
    square = Z95**2 / n
    middle = (share + square / 2) / (1 + square)  # between the share and one half: the fewer trials, the nearer to it
    half = math.sqrt(max(share * (1 - share), 0.0) / n * Z95**2 + square**2 / 4) / (1 + square)
    return middle - half, middle + half


def calibration(margins: np.ndarray, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error of score differences (N,), better minus worse (Guo et al., 2017, eq. 3).

    The model predicts that the text with the higher score is the better one, with confidence sigmoid(|difference|),
    between 1/2 and 1. It is right if the difference is positive, and half right if it is zero. Confidences fall into
    `n_bins` bins of equal width; the error is the mean distance between confidence and share right in a bin, weighted
    by the number of comparisons.

    scikit-learn's `calibration_curve` cannot be used: it refuses outcomes of one half, and does not return the counts
    that weight the bins.

    Example:
        >>> import numpy as np
        >>> from agents import calibration
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
        margins: The score differences, better minus worse: one array (pairs,) per ranking. The interval counts a
            ranking as one trial, since its pairs depend on each other; it is rather too wide than too narrow.
        is_log_odds: Whether the sigmoid of a difference is a probability; without it there is no calibration error.
    """
    differences = np.concatenate(margins)  # (pairs of all rankings,)
    accuracy = pair_accuracy(differences)
    error = calibration(differences) if is_log_odds else None
    return RewardFigures(loss, accuracy, *wilson_interval(accuracy, len(margins)), error, len(differences))
