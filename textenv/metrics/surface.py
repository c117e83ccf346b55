"""Metrics of the texts alone: their length, the variety of their n-grams, and the share of blank and broken ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from textenv.metrics.scores import Scores, mean_of
from textenv.text.tokenizer import Tokenizer

Split = Callable[[str], Sequence[str]]
# A stretch of up to 30 characters, with a letter first, that stands four times in a row.
REPEATED = re.compile(r"([^\W\d_].{0,29}?)\1{3}", re.DOTALL)


class Length:
    """The mean length of the texts: `length_words`, or `length_tokens` with a tokenizer.

    Args:
        tokenizer: The tokenizer whose tokens are counted; None counts words, which are separated by white space.

    Example:
        >>> Length()(["The", "A"], [" film was good", " dog"], [[], []])["length_words"].value
        2.0
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the mean length."""
        if self.tokenizer is None:
            return {"length_words": mean_of([len(text.split()) for text in texts])}
        encode = self.tokenizer.encode
        return {"length_tokens": mean_of([len(encode(text, add_special_tokens=False)) for text in texts])}


class Distinct:
    """The share of different n-grams among all n-grams of the texts: `distinct_n` (Li et al., 2016, section 5.2).

    The share falls with the number of texts, so compare equal numbers of texts. It has no interval: a text that is
    drawn twice would make the resampled figure smaller than the true one. It is nan where no text has n words.

    Args:
        orders: The values of n.
        split: The function that cuts a text into words, by default at white space; `list` cuts it into characters, as
            Chinese needs it.

    Raises:
        ValueError: If `orders` is empty or has a number below 1.

    Example:
        >>> scores = Distinct()(["", ""], ["a b a b", "a b"], [[], []])
        >>> scores["distinct_1"].value == 2 / 6, scores["distinct_2"].value == 2 / 4
        (True, True)
    """

    def __init__(self, orders: Sequence[int] = (1, 2), split: Split = str.split) -> None:
        if not orders or min(orders) < 1:
            raise ValueError(f"Expected `orders` to be one or more numbers of at least 1, got {orders}.")
        self.orders, self.split = tuple(orders), split

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the share of different n-grams for each n, by `distinct_n`."""
        words = [self.split(text) for text in texts]
        scores = {}
        for n in self.orders:
            # Each text by itself, so that no n-gram spans two texts.
            ngrams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
            share = len(set(ngrams)) / len(ngrams) if ngrams else math.nan
            scores[f"distinct_{n}"] = Scores(np.zeros((len(texts), 0)), whole=share)
        return scores


class Broken:
    """The shares of texts that nobody would want, whatever their reward: `blank` and `broken`.

    A text is blank if it has neither letter nor digit. It is broken if bytes in it make no character (U+FFFD), or if up
    to 30 characters, of which the first is a letter, are repeated four times in a row.

    Example:
        >>> scores = Broken()([""] * 4, [" ...", "good good good good", "a good film", "no, no, no!"], [[]] * 4)
        >>> scores["blank"].value, scores["broken"].value
        (0.25, 0.25)
    """

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the two shares."""
        # The stretch ends with its separator, which a repetition at the end of a text lacks.
        broken = ["\ufffd" in text or REPEATED.search(f"{text} ") is not None for text in texts]
        return {
            "blank": mean_of([not any(letter.isalnum() for letter in text) for text in texts]),
            "broken": mean_of(broken),
        }
