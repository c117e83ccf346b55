"""Confidence intervals of figures and of paired differences: the BCa bootstrap over prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from textenv.metrics.scores import Scores

BATCH = 100  # resamples that are computed together: 100 times 10,000 rows of int64 are 8 MB
ROUNDING = 1e-12  # a spread below this share of a figure is rounding: the same sums, added in another order


class Estimate(NamedTuple):
    """A figure and its 95 % interval, whose ends are None where the figure has no interval."""

    value: float
    low: float | None = None
    high: float | None = None


def per_prompt(scores: Scores, n: int) -> Scores:
    """Return scores with one row for each prompt: the sums over its `n` texts, which are consecutive rows."""
    if scores.whole is not None or n == 1:
        return scores
    return scores._replace(rows=scores.rows.reshape(-1, n, scores.rows.shape[1]).sum(axis=1))  # (P, K)


def figures_of(scores: Scores, drawn: np.ndarray) -> np.ndarray:
    """Return the figure of each resample, (B,).

    Args:
        scores: The scores of N rows.
        drawn: The numbers of the rows in each resample: (B, N) with repetitions, or (B, N - 1) without one of them.
    """
    n = len(scores.rows)
    if drawn.shape[1] == n - 1:
        # The jackknife of scipy's BCa (`_resampling._jackknife_resample`). The sum of all rows minus the row that is
        # left out is N times as fast as a new sum; the number of that row is missing from the sum 0 + ... + (N - 1).
        left_out = n * (n - 1) // 2 - drawn.sum(axis=1)  # (B,)
        sums = scores.rows.sum(axis=0) - scores.rows[left_out]  # (B, K)
    else:
        counts = np.stack([np.bincount(rows, minlength=n) for rows in drawn])  # (B, N): how often each row was drawn
        sums = counts @ scores.rows  # (B, K)
    return np.array([scores.figure(total) for total in sums])


def estimate(scores: Scores, seed: int = 0, n_resamples: int = 1000) -> Estimate:
    """Return the figure with its 95 % interval.

    The interval is bias-corrected and accelerated (BCa; Efron, 1987), by `scipy.stats.bootstrap`. There is none if the
    figure does not follow from sums over rows, if there is a single row, which shows no spread, or if some resample has
    no figure (the perplexity of empty texts only).

    Args:
        scores: The scores, whose rows are drawn with replacement.
        seed: The seed of the draws.
        n_resamples: The number of resamples, each of as many rows as there are.

    Example:
        >>> from textenv.metrics.scores import mean_of
        >>> estimate(mean_of([0.5] * 10))
        Estimate(value=0.5, low=0.5, high=0.5)
        >>> estimate(mean_of([0.5]))
        Estimate(value=0.5, low=None, high=None)
    """
    if scores.whole is not None:
        return Estimate(scores.value)
    n = len(scores.rows)
    return with_interval(scores.value, lambda drawn: figures_of(scores, drawn), (n,), seed, n_resamples)


def difference(after: Scores, before: Scores, seed: int = 0, n_resamples: int = 1000) -> Estimate:
    """Return after - before with its 95 % interval, as `estimate` does; the same prompts are drawn for both.

    Raises:
        ValueError: If the two have different numbers of rows.
    """
    value = after.value - before.value
    if after.whole is not None or before.whole is not None:
        return Estimate(value)
    if len(after.rows) != len(before.rows):
        raise ValueError(f"Expected the same prompts twice, got {len(after.rows)} and {len(before.rows)} rows.")
    return with_interval(
        value,
        lambda drawn: figures_of(after, drawn) - figures_of(before, drawn),
        (len(after.rows),),
        seed,
        n_resamples,
    )


def with_interval(
    value: float,
    figures: Callable[..., np.ndarray],
    sizes: Sequence[int],
    seed: int = 0,
    n_resamples: int = 1000,
    method: Literal["BCa", "percentile"] = "BCa",
) -> Estimate:
    """Return a figure with its 95 % interval by `scipy.stats.bootstrap`; without one if anything drawn is single.

    Args:
        value: The figure.
        figures: The function from a resample of each kind of rows, B of them, to B figures: it takes one array of
            numbers of rows, (B, n), for each kind, and returns (B,).
        sizes: The number of rows, n, of each kind (such as seeds and prompts), which are drawn independently.
        seed: The seed of the draws.
        n_resamples: The number of resamples.
        method: The interval between the draws' quantiles ("percentile"), or bias-corrected and accelerated ("BCa").

    Example:
        >>> with_interval(0.5, lambda drawn: np.array([0.0, 1.0])[drawn].mean(axis=1), (2,), method="percentile")
        Estimate(value=0.5, low=0.0, high=1.0)
    """
    from scipy.stats import bootstrap  # here, since it takes as long to import as all of textenv

    if min(sizes, default=0) < 2:
        return Estimate(value)
    with warnings.catch_warnings():
        # scipy divides by 0 where it finds no interval, and then warns of that.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = bootstrap(
            [np.arange(n) for n in sizes],
            # Drawn are (B, n); the rows themselves, which BCa takes as well, are (n,).
            lambda *drawn, axis: figures(*map(np.atleast_2d, drawn)).reshape(drawn[0].shape[:-1]),
            n_resamples=n_resamples,
            batch=BATCH,
            vectorized=True,
            method=method,
            rng=np.random.default_rng(seed),
        )
    draws = result.bootstrap_distribution
    if np.ptp(draws) <= ROUNDING * np.abs(draws).max():
        return Estimate(value, value, value)
    low, high = result.confidence_interval
    return Estimate(value, float(low), float(high)) if np.isfinite([low, high]).all() else Estimate(value)
