"""The agreement of raters with each other and with themselves."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from textenv.checks.extras import needs
from textenv.feedback.records import UNDECIDED, Answer


class Agreement(NamedTuple):
    """The agreement of raters on one kind of question.

    Attributes:
        alpha: Krippendorff's alpha: 1 for full agreement, 0 for agreement by chance, below 0 for less than by chance;
            NaN where all answers were the same.
        units: The number of scores, choices or pairs of ranked completions that at least two raters gave.
        raters: The number of those raters.
    """

    alpha: float
    units: int
    raters: int


class SelfAgreement(NamedTuple):
    """The agreement of a rater's two answers to each gold item.

    Attributes:
        alike: The mean agreement, from 0 for opposite answers to 1 for equal ones.
        items: The number of gold items that were answered twice.
    """

    alike: float
    items: int


def agreement(answers: Iterable[Answer]) -> dict[str, Agreement]:
    """Return the agreement for each kind of question in which two raters answered some item.

    The figure is Krippendorff's alpha (Krippendorff, 2011, "Computing Krippendorff's Alpha-Reliability") from the
    `krippendorff` library. Scores differ by their squared difference (level "interval"). Choices are equal or not
    (level "nominal"), as is the better completion of each ranked pair. Each rater's first answer to an item counts.

    Raises:
        ImportError: If krippendorff is not installed: `pip install "textenv[feedback]"`.

    Example:
        >>> votes = {"ann": [0, 1, 1, 0], "bob": [0, 1, 1, 1]}
        >>> rows = [(rater, item, vote) for rater in votes for item, vote in enumerate(votes[rater])]
        >>> answers = [Answer(0, item, "compare", rater, "", ("x", "y"), vote) for rater, item, vote in rows]
        >>> round(agreement(answers)["compare"].alpha, 3)  # 1 - (7 * 2) / (2 * 3 * 5) by hand
        0.533
    """
    # kind -> unit -> rater -> value
    units: dict[str, dict[tuple[int, ...], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for answer in answers:
        if answer.repeat == 0 and answer.kind in ("score", "compare", "rank"):
            for unit, value in _values(answer).items():
                units[answer.kind][unit][answer.rater] = value
    shared = {kind: [unit for unit in by_unit.values() if len(unit) > 1] for kind, by_unit in units.items()}
    return {kind: _alpha(kind, values) for kind, values in shared.items() if values}


def self_agreement(answers: Iterable[Answer]) -> dict[str, SelfAgreement]:
    """Return, for each rater, the agreement of their first and second answers to gold items.

    An item counts 1 for the same choice and 0 for another; scores count 1 minus their mean difference, as a share of
    the scale's width; a ranking counts the share of pairs that were ranked alike both times.
    """
    twice: dict[tuple[str, int], dict[int, Answer]] = defaultdict(dict)
    for answer in answers:
        if answer.kind in ("score", "compare", "rank"):
            twice[answer.rater, answer.item][answer.repeat] = answer
    alike = defaultdict(list)
    for (rater, _), both in twice.items():
        if len(both) == 2:
            low, high = both[0].scale
            width = high - low if both[0].kind == "score" else 1.0
            first, second = _values(both[0]), _values(both[1])
            # Nominal values differ by up to 3 (see `_values`): capped at 1, they are equal or not.
            differences = [min(abs(first[unit] - second[unit]) / width, 1.0) for unit in first]
            alike[rater].append(1.0 - float(np.mean(differences)))
    return {rater: SelfAgreement(float(np.mean(shares)), len(shares)) for rater, shares in alike.items()}


def _values(answer: Answer) -> dict[tuple[int, ...], float]:
    """Return the value of each unit of an answer: a scored completion, a choice, or a pair of ranked completions."""
    if answer.kind == "score" and isinstance(answer.value, tuple):
        return {(answer.item, index): float(score) for index, score in enumerate(answer.value)}
    if answer.kind == "compare":
        choices = [0, 1, *UNDECIDED]
        return {(answer.item,): float(choices.index(answer.value))}
    decided = set(answer.pairs())
    pairs = itertools.combinations(range(len(answer.completions)), 2)
    return {(answer.item, *pair): float(pair in decided) for pair in pairs}


def _alpha(kind: str, units: Sequence[Mapping[str, float]]) -> Agreement:
    with needs("feedback", "krippendorff", "the agreement between raters"):
        import krippendorff
    raters = sorted({rater for unit in units for rater in unit})
    table = np.array([[unit.get(rater, np.nan) for unit in units] for rater in raters])  # (raters, units)
    if len(np.unique(table[~np.isnan(table)])) == 1:  # alpha divides by the expected disagreement, which is 0 here
        return Agreement(math.nan, len(units), len(raters))
    level: Literal["interval", "nominal"] = "interval" if kind == "score" else "nominal"
    return Agreement(float(krippendorff.alpha(table, level_of_measurement=level)), len(units), len(raters))
