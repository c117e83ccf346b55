"""What a metric is: a callable over aligned lists, and scores that add up over rows, so that they can be resampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Figure = Callable[[np.ndarray], float]


def ratio(sums: np.ndarray) -> float:
    """Return the first sum over the second; nan where that is 0."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


class Scores(NamedTuple):
    """What a metric says of N rows.

    Most figures of a corpus are no means of the rows' own figures (BLEU, perplexity), but all of them follow from sums
    over the rows: a mean from the sum of values and their number, a perplexity from the sum of log-probabilities and of
    tokens.

    Attributes:
        rows: What each row adds to the sums, (N, K) float64.
        figure: Maps the sums, (K,), to the figure.
        whole: Where a figure does not follow from sums over rows (distinct n-grams): the figure, and `rows` is (N, 0).

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
        """The figure of each row alone, (N,); None where there is none."""
        return np.array([self.figure(row) for row in self.rows]) if self.whole is None else None


class Metric(Protocol):
    """A metric: any callable with this signature, also one of your own.

    `agents.evaluate` gives it the prompts as `Prompt`s, whose `row` has the other columns of the data set.

    Example:
        >>> def mentions_film(prompts, texts, references):
        ...     return {"mentions_film": mean_of(["film" in text for text in texts])}
        >>> mentions_film(["The"], [" film was good"], [[]])["mentions_film"].value
        1.0
    """

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Mapping[str, Scores]:
        """Return the scores of N rows by name; each text has any number of references."""
        ...


def mean_of(values: Sequence[float] | np.ndarray) -> Scores:
    """Return scores whose figure is the mean of the rows' values, (N,)."""
    numbers = np.asarray(values, dtype=np.float64)
    return Scores(np.stack([numbers, np.ones_like(numbers)], axis=1))  # (N, 2)


def check_references(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise where a text has no reference to be compared with.

    Raises:
        ValueError: Naming the first such row, or the numbers of texts and references.
    """
    if len(texts) != len(references):
        raise ValueError(f"Expected a list of references for each of {len(texts)} texts, got {len(references)}.")
    for row, own in enumerate(references):
        if len(own) == 0 or isinstance(own, str):
            raise ValueError(
                f"Expected a list of one or more references for each text, got {own!r:.80} for row {row}: name the "
                "column that holds them with references_column, or drop the row."
            )
