"""Metrics of the texts alone against values worked by hand."""

import math

import pytest

from textenv import CharTokenizer
from textenv.metrics import Broken, Distinct, Length
from textenv.metrics.bootstrap import estimate


def test_lengths_by_hand():
    assert Length()(["", ""], ["a bc  d", ""], [[], []])["length_words"].per_row.tolist() == [3.0, 0.0]
    assert Length(CharTokenizer())(["", ""], ["a bc", "d"], [[], []])["length_tokens"].value == 2.5


def test_distinct_by_hand():
    """Unigrams a b a c d: 4 of 5. Bigrams ab, ba, cd: 3 of 3; words do not cross texts."""
    scores = Distinct((1, 2, 4))([""] * 3, ["a b a", "c d", ""], [[]] * 3)
    assert scores["distinct_1"].value == 4 / 5 and scores["distinct_2"].value == 1.0
    assert math.isnan(scores["distinct_4"].value)
    assert estimate(scores["distinct_1"]) == (0.8, None, None)
    assert Distinct((1,), split=list)([""], ["好好看"], [[]])["distinct_1"].value == 2 / 3
    with pytest.raises(ValueError, match="`orders` to be one or more numbers of at least 1"):
        Distinct(())


@pytest.mark.parametrize(
    ("text", "blank", "broken"),
    [
        ("", 1, 0),
        (" ... !", 1, 0),
        ("7", 0, 0),
        ("\u4e0d\u9519", 0, 0),
        ("very very very good", 0, 0),  # three times is emphasis
        ("very very very very", 0, 1),
        ("\u597d\u597d\u597d\u597d", 0, 1),
        ("It is a film. It is a film. It is a film. It is a film.", 0, 1),
        ("caf\ufffd", 0, 1),
        ("10000000 ........", 0, 0),
    ],
)
def test_blank_and_broken_texts(text, blank, broken):
    scores = Broken()(["film"], [text], [[]])
    assert (scores["blank"].value, scores["broken"].value) == (blank, broken)
