"""How far raters agree, by hand and by the definition."""

import itertools
import math

import pytest

from textenv.feedback.agreement import agreement, self_agreement
from textenv.feedback.records import Answer

krippendorff = pytest.importorskip("krippendorff", reason='needs krippendorff: pip install "textenv[feedback]"')


def answers(kind, table, n=2, repeat=0, scale=(1, 5)):
    """What raters (rows) said of items (columns); None where they said nothing."""
    return [
        Answer(0, item, kind, rater, "", ("x",) * n, value, repeat=repeat, scale=scale)
        for rater, values in table.items()
        for item, value in enumerate(values)
        if value is not None
    ]


def test_scores_by_the_libraries_own_example():
    """Four raters of twelve units, from the library's documentation, with its published ordinal and ratio values."""
    x = None
    table = {
        "a": [1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x],
        "b": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3],
        "c": [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x],
        "d": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x],
    }
    scores = {rater: [None if v is None else (float(v),) for v in row] for rater, row in table.items()}
    found = agreement(answers("score", scores, n=1))["score"]
    units = [[row[unit] for row in table.values() if row[unit] is not None] for unit in range(12)]
    assert (found.units, found.raters) == (11, 4)
    assert found.alpha == pytest.approx(interval_alpha(units)) and found.alpha == pytest.approx(0.849, abs=1e-3)


def interval_alpha(units):
    """Krippendorff's definition, 1 - observed / expected disagreement, over all ordered pairs of values."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    observed = sum(sum((a - b) ** 2 for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


def test_choices_by_hand():
    """Of 4 items, 8 votes: 3 for 0, 5 for 1; one item divides the raters: 1 - 7 * 2 / (2 * 3 * 5)."""
    found = agreement(answers("compare", {"ann": [0, 1, 1, 0], "bob": [0, 1, 1, 1]}))["compare"]
    assert found == (pytest.approx(1 - 14 / 30), 4, 2)


def test_ties_are_answers_of_their_own():
    same = {"ann": ["tie", 0, "both_bad", 1], "bob": ["tie", 0, "both_bad", 1]}
    assert agreement(answers("compare", same))["compare"].alpha == 1.0
    other = same | {"bob": ["both_bad", 0, "tie", 1]}
    assert agreement(answers("compare", other))["compare"].alpha < 0.5


def test_rankings_by_pairs():
    """Alike in five of six pairs; a choice of two items of the same pairs says the same."""
    found = agreement(answers("rank", {"ann": [(0, 1, 2), (2, 1, 0)], "bob": [(0, 2, 1), (2, 1, 0)]}, n=3))["rank"]
    choices = {"ann": [0, 0, 0, 1, 1, 1], "bob": [0, 0, 1, 1, 1, 1]}
    assert found == (pytest.approx(agreement(answers("compare", choices))["compare"].alpha), 6, 2)


def test_rankings_that_are_reversed_disagree_more_than_chance():
    found = agreement(answers("rank", {"ann": [(0, 1, 2), (2, 1, 0)], "bob": [(2, 1, 0), (0, 1, 2)]}, n=3))["rank"]
    assert found.alpha < 0


def test_what_one_rater_saw_alone_says_nothing():
    assert agreement(answers("compare", {"ann": [0, 1, None], "bob": [None, None, 1]})) == {}
    same = agreement(answers("compare", {"ann": [0, 0], "bob": [0, 0]}))["compare"]
    assert math.isnan(same.alpha) and same.units == 2


def test_repeats_and_skips_do_not_count_between_raters():
    rows = answers("compare", {"ann": [0, 1], "bob": [0, 1]})
    more = answers("compare", {"ann": [1, 0]}, repeat=1) + answers("skip", {"ann": [None], "cy": [None]})
    assert agreement(rows + more) == agreement(rows)


def test_agreement_with_oneself_by_hand():
    rows = [
        *answers("compare", {"ann": [0, 1, "tie"]}),
        *answers("compare", {"ann": [0, 0, None], "bob": [1]}, repeat=1),
        *answers("score", {"cy": [(1.0, 5.0)]}),
        *answers("score", {"cy": [(2.0, 5.0)]}, repeat=1),  # off by 1 of 4, and by 0
        *answers("rank", {"dee": [(0, 1, 2)]}, n=3),
        *answers("rank", {"dee": [(0, 2, 1)]}, n=3, repeat=1),
    ]
    assert self_agreement(rows) == {"ann": (0.5, 2), "cy": (0.875, 1), "dee": (pytest.approx(2 / 3), 1)}
