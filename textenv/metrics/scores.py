"""The protocol of metrics, and their scores: terms of sums over rows, so that rows can be resampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Figure = Callable[[np.ndarray], float]


def ratio(sums: np.ndarray) -> float:
    """Return the first sum divided by the second; nan if the second is 0."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


class Scores(NamedTuple):
    """The result of a metric on N rows: the terms that each row adds to K sums, and the figure as a function of these.

    Many figures of a corpus are not the mean of the rows' own figures (BLEU, perplexity), but nearly all follow from
    sums over the rows: a mean from the sum of the values and their number, a perplexity from the sums of nats and of
    tokens.

    Attributes:
        rows: The terms of each row, (N, K) float64.
        figure: The function from the sums, (K,), to the figure.
        whole: The figure itself if it does not follow from sums over rows (distinct n-grams), in which case `rows` is
            (N, 0); else None.

    Example:
        >>> scores = mean_of([1.0, 2.0, 6.0])
        >>> scores.value, scores.per_row.tolist()
        (3.0, [1.0, 2.0, 6.0])
    """

    rows: np.ndarray
    figure: Figure = ratio
    whole: float | None = None

    @property
    def value(self) -> float:
        """The figure of all rows."""
        return self.figure(self.rows.sum(axis=0)) if self.whole is None else self.whole

    @property
    def per_row(self) -> np.ndarray | None:
        """The figure of each row alone, (N,); None if the figure does not follow from sums over rows."""
        return np.array([self.figure(row) for row in self.rows]) if self.whole is None else None


class Metric(Protocol):
    """The protocol of metrics: any callable with this signature.

    The prompts that `agents.evaluate` passes are `Prompt`s, whose `row` has the other columns of the data set.

    Example:
        >>> def mentions_film(prompts, texts, references):
        ...     return {"mentions_film": mean_of(["film" in text for text in texts])}
        >>> mentions_film(["The"], [" film was good"], [[]])["mentions_film"].value
        1.0
    """

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Mapping[str, Scores]:
        """Return the scores of N rows by the name of the figure; a text may have any number of references."""
        ...


def mean_of(values: Sequence[float] | np.ndarray) -> Scores:
    """Return scores whose figure is the mean of the rows' values, (N,).

    Example:
        >>> mean_of([1.0, 2.0, 6.0]).value
        3.0
    """
    numbers = np.asarray(values, dtype=np.float64)
    return Scores(np.stack([numbers, np.ones_like(numbers)], axis=1))  # (N, 2): `ratio` divides the sums


def check_references(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Check that each text has a reference.

    Raises:
        ValueError: If a text has no reference, or the numbers of texts and of lists of references differ.
    """
    if len(texts) != len(references):
        raise ValueError(f"Expected a list of references for each of {len(texts)} texts, got {len(references)}.")
    for row, own in enumerate(references):
        if len(own) == 0 or isinstance(own, str):
            raise ValueError(
                f"Expected a list of one or more references for each text, got {own!r:.80} for row {row}: name the "
                "column that holds them with references_column, or drop the row."
            )
