"""Agreement of raters, by hand and by Krippendorff's definition."""

import itertools
import math

import pytest

from textenv.feedback.agreement import agreement, self_agreement
from textenv.feedback.records import Answer

krippendorff = pytest.importorskip("krippendorff", reason='needs krippendorff: pip install "textenv[feedback]"')


def answers(kind, table, n=2, repeat=0, scale=(1, 5)):
    """Return the answers of raters (rows of `table`) to items (columns); None stands for no answer."""
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
    result = agreement(answers("score", scores, n=1))["score"]
    units = [[row[unit] for row in table.values() if row[unit] is not None] for unit in range(12)]
    assert (result.units, result.raters) == (11, 4)
    assert result.alpha == pytest.approx(interval_alpha(units)) and result.alpha == pytest.approx(0.849, abs=1e-3)


def interval_alpha(units):
    """Krippendorff's definition, 1 - observed / expected disagreement, over all ordered pairs of values."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    observed = sum(sum((a - b) ** 2 for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


def test_choices_by_hand():
    """4 items have 8 votes, 3 for 0 and 5 for 1, and the raters differ on one item: 1 - 7 * 2 / (2 * 3 * 5)."""
    result = agreement(answers("compare", {"ann": [0, 1, 1, 0], "bob": [0, 1, 1, 1]}))["compare"]
    assert result == (pytest.approx(1 - 14 / 30), 4, 2)


def test_ties_are_answers_of_their_own():
    same = {"ann": ["tie", 0, "both_bad", 1], "bob": ["tie", 0, "both_bad", 1]}
    assert agreement(answers("compare", same))["compare"].alpha == 1.0
    other = same | {"bob": ["both_bad", 0, "tie", 1]}
    assert agreement(answers("compare", other))["compare"].alpha < 0.5


def test_rankings_by_pairs():
    """The rankings agree on five of six pairs; choices between the same pairs have the same alpha."""
    result = agreement(answers("rank", {"ann": [(0, 1, 2), (2, 1, 0)], "bob": [(0, 2, 1), (2, 1, 0)]}, n=3))["rank"]
    choices = {"ann": [0, 0, 0, 1, 1, 1], "bob": [0, 0, 1, 1, 1, 1]}
    assert result == (pytest.approx(agreement(answers("compare", choices))["compare"].alpha), 6, 2)


def test_rankings_that_are_reversed_disagree_more_than_chance():
    result = agreement(answers("rank", {"ann": [(0, 1, 2), (2, 1, 0)], "bob": [(2, 1, 0), (0, 1, 2)]}, n=3))["rank"]
    assert result.alpha < 0


def test_items_of_one_rater_do_not_count():
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
