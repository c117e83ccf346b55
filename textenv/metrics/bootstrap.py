"""How sure a figure is: percentile bootstrap intervals over prompts, also of paired differences."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from textenv.metrics.scores import Scores

PERCENTILES = (2.5, 97.5)


class Estimate(NamedTuple):
    """A figure and its 95 % interval; None where the figure has none."""

    value: float
    low: float | None = None
    high: float | None = None


def per_prompt(scores: Scores, n: int) -> Scores:
    """Return scores of which a row is a prompt: what its `n` texts, which stand together, add."""
    if scores.whole is not None or n == 1:
        return scores
    return scores._replace(rows=scores.rows.reshape(-1, n, scores.rows.shape[1]).sum(axis=1))  # (P, K)


def resampled(scores: Scores, seed: int = 0, n_resamples: int = 1000) -> np.ndarray:
    """Return the figure of as many rows drawn with replacement, `n_resamples` times; the seed decides which.

    (Efron, 1979.) Scores of equally many rows are drawn alike, so that two can be subtracted.
    """
    generator = np.random.default_rng(seed)
    n = len(scores.rows)
    figures = np.empty(n_resamples)
    for i in range(n_resamples):
        counts = np.bincount(generator.integers(n, size=n), minlength=n)  # how often each row was drawn
        figures[i] = scores.figure(counts @ scores.rows)
    return figures


def estimate(scores: Scores, seed: int = 0, n_resamples: int = 1000) -> Estimate:
    """Return the figure with its 95 % percentile interval.

    Example:
        >>> from textenv.metrics.scores import mean_of
        >>> estimate(mean_of([0.5] * 10))
        Estimate(value=0.5, low=0.5, high=0.5)
    """
    if scores.whole is not None:
        return Estimate(scores.value)
    return Estimate(scores.value, *_interval(resampled(scores, seed, n_resamples)))


def difference(after: Scores, before: Scores, seed: int = 0, n_resamples: int = 1000) -> Estimate:
    """Return after - before with its 95 % interval, the same prompts drawn for both.

    Raises:
        ValueError: If they have different numbers of rows.
    """
    value = after.value - before.value
    if after.whole is not None or before.whole is not None:
        return Estimate(value)
    if len(after.rows) != len(before.rows):
        raise ValueError(f"Expected the same prompts twice, got {len(after.rows)} and {len(before.rows)} rows.")
    draws = resampled(after, seed, n_resamples) - resampled(before, seed, n_resamples)
    return Estimate(value, *_interval(draws))


def _interval(draws: np.ndarray) -> tuple[float | None, float | None]:
    """Return the percentiles of the draws that have a figure: one of empty texts alone has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no draw has one
        low, high = np.nanpercentile(draws, PERCENTILES)
    return (None, None) if np.isnan(low) else (float(low), float(high))
