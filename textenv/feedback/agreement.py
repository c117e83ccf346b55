"""How far raters agree, with each other and with themselves."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from textenv.extras import needs
from textenv.feedback.records import UNDECIDED, Answer


class Agreement(NamedTuple):
    """How far raters agree on one kind of question.

    Attributes:
        alpha: Krippendorff's alpha: 1 for full agreement, 0 for that of chance, below 0 for less; NaN where two raters
            shared nothing, or all answers were the same.
        units: How many scores, choices or pairs of ranked completions two raters or more gave.
        raters: How many raters gave them.
    """

    alpha: float
    units: int
    raters: int


class SelfAgreement(NamedTuple):
    """How far a rater answered gold items the second time as the first: 1 for the same, 0 for the opposite."""

    alike: float
    items: int


def agreement(answers: Iterable[Answer]) -> dict[str, Agreement]:
    """Return how far raters agree, for each kind of question that two of them answered an item of.

    Krippendorff's alpha (Krippendorff, 2011, "Computing Krippendorff's Alpha-Reliability") by the `krippendorff`
    library: of scores with squared differences; of choices, and of which of each two ranked completions is better, with
    the same or not. Every rater's first answer to an item counts.

    Needs krippendorff: `pip install "textenv[feedback]"`.

    Raises:
        ImportError: Without krippendorff.

    Example:
        >>> votes = {"ann": [0, 1, 1, 0], "bob": [0, 1, 1, 1]}
        >>> rows = [(rater, item, vote) for rater in votes for item, vote in enumerate(votes[rater])]
        >>> answers = [Answer(0, item, "compare", rater, "", ("x", "y"), vote) for rater, item, vote in rows]
        >>> round(agreement(answers)["compare"].alpha, 3)  # 1 - (7 * 2) / (2 * 3 * 5) by hand
        0.533
    """
    units: dict[str, dict[tuple[int, ...], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for answer in answers:
        if answer.repeat == 0 and answer.kind in ("score", "compare", "rank"):
            for unit, value in _values(answer).items():
                units[answer.kind][unit][answer.rater] = value
    shared = {kind: [unit for unit in of.values() if len(unit) > 1] for kind, of in units.items()}
    return {kind: _alpha(kind, of) for kind, of in shared.items() if of}


def self_agreement(answers: Iterable[Answer]) -> dict[str, SelfAgreement]:
    """Return how far each rater repeated their answers to gold items.

    An item counts 1 for the same choice, 1 less the mean difference of scores in scales, or the share of pairs that
    were ranked alike.
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
            differences = [min(abs(first[unit] - second[unit]) / width, 1.0) for unit in first]
            alike[rater].append(1.0 - float(np.mean(differences)))
    return {rater: SelfAgreement(float(np.mean(shares)), len(shares)) for rater, shares in alike.items()}


def _values(answer: Answer) -> dict[tuple[int, ...], float]:
    """Return what an answer says of each unit: a completion, a choice, or two completions of a ranking."""
    if answer.kind == "score" and isinstance(answer.value, tuple):
        return {(answer.item, place): float(score) for place, score in enumerate(answer.value)}
    if answer.kind == "compare":
        named = [0, 1, *UNDECIDED]
        return {(answer.item,): float(named.index(answer.value))}
    decided = set(answer.pairs())
    places = itertools.combinations(range(len(answer.completions)), 2)
    return {(answer.item, *pair): float(pair in decided) for pair in places}


def _alpha(kind: str, units: Sequence[Mapping[str, float]]) -> Agreement:
    with needs("feedback", "krippendorff", "the agreement between raters"):
        import krippendorff
    raters = sorted({rater for unit in units for rater in unit})
    table = np.array([[unit.get(rater, np.nan) for unit in units] for rater in raters])  # (raters, units)
    if len(np.unique(table[~np.isnan(table)])) == 1:
        return Agreement(math.nan, len(units), len(raters))
    level: Literal["interval", "nominal"] = "interval" if kind == "score" else "nominal"
    return Agreement(float(krippendorff.alpha(table, level_of_measurement=level)), len(units), len(raters))
