"""Rewards that follow from the text alone, by a rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from textenv.completion import Preds
from textenv.prompts import Prompt
from textenv.rewards.base import RowReward, check_choice


@dataclass
class Length(RowReward):
    """How close a text's length is to a target: 1 at it, falling evenly to 0 at nothing and at twice the target.

    max(0, 1 - |n - target| / target).

    Args:
        target: The length wanted.
        unit: "tokens" (the policy's, an end token counts), "words" (between spaces) or "characters".

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> Length(4, unit="characters")(Prompt("a"), Preds(CharTokenizer("ab"), [1, 2, 1]), True)
        0.75
    """

    target: int
    unit: Literal["tokens", "words", "characters"] = "tokens"

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"Expected `target` to be at least 1, got {self.target}.")
        check_choice("unit", self.unit, ("tokens", "words", "characters"))

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the closeness, in [0, 1]."""
        if self.unit == "tokens":
            n = len(preds)
        else:
            n = len(preds.text.split() if self.unit == "words" else preds.text)
        return max(0.0, 1.0 - abs(n - self.target) / self.target)


@dataclass
class Repetition(RowReward):
    """A penalty for repeating oneself: minus the share of the text's n-grams of words that occurred in it before.

    (distinct n-grams / n-grams) - 1, in (-1, 0]; 0 where the text has no n-gram. As in Yeo et al. 2025 (Demystifying
    Long Chain-of-Thought Reasoning in LLMs).

    Args:
        n: How many words an n-gram has.
        unit: "words" (between spaces), or "characters", for languages written without spaces.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> Repetition(2, unit="characters")(Prompt("a"), Preds(CharTokenizer("ab"), [1, 2, 1, 2, 1]), True)
        -0.5
    """

    n: int = 3
    unit: Literal["words", "characters"] = "words"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Expected `n` to be at least 1, got {self.n}.")
        check_choice("unit", self.unit, ("words", "characters"))

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return minus the share, in (-1, 0]."""
        words = preds.text.split() if self.unit == "words" else list(preds.text)
        ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


@dataclass
class Keyword(RowReward):
    """The share of some words that the text has, each as a whole word.

    Args:
        words: The words, or groups of words ("machine learning").
        ignore_case: Whether "Good" counts as "good".
        column: Where the words of each prompt are in its row, instead of `words`: one, or a list.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer = CharTokenizer("cat ")
        >>> Keyword(["cat", "act"])(Prompt("a"), Preds(tokenizer, [1, 2, 3, 4, 1, 2]), True)
        0.5
    """

    words: Sequence[str] = ()
    ignore_case: bool = True
    column: str | None = None

    def __post_init__(self) -> None:
        self.words = _listed(self.words)
        if bool(self.words) == (self.column is not None):
            raise ValueError(f"Expected either `words` or `column`, got {self.words} and {self.column!r}.")

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the share, in [0, 1]."""
        words = self.words if self.column is None else _listed(prompt.row[self.column])
        flags = re.IGNORECASE if self.ignore_case else 0
        # Not \b: a keyword may begin or end with a sign, as "C++".
        found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", preds.text, flags) is not None for word in words]
        return sum(found) / len(words)


@dataclass
class Regex(RowReward):
    """1 where the text matches a regular expression (of Python's `re`), 0 elsewhere.

    Args:
        pattern: The expression; inline flags, as "(?i)yes", are understood.
        whole: Whether the whole text must match, or a part will do.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> Regex("a+b")(Prompt("a"), Preds(CharTokenizer("ab"), [1, 1, 2]), True)
        1.0
    """

    pattern: str
    whole: bool = True

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Expected a regular expression, got {self.pattern!r}: {error}.") from error

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return 1.0 or 0.0."""
        match = re.fullmatch if self.whole else re.search
        return float(match(self.pattern, preds.text) is not None)


@dataclass
class Format(RowReward):
    """1 where the text is made of tagged sections, each once and in order, with nothing but space between; else 0.

    With the default: `<think> ... </think> <answer> ... </answer>`, as in DeepSeek-R1 (2025, table 1).

    Args:
        tags: The sections, in order.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer = CharTokenizer("<a>/ b")
        >>> ids = tokenizer.encode("<a> b </a>")
        >>> [Format([tag])(Prompt("a"), Preds(tokenizer, ids), True) for tag in "ab"]
        [1.0, 0.0]
    """

    tags: Sequence[str] = ("think", "answer")

    def __post_init__(self) -> None:
        self.tags = _listed(self.tags)
        if not self.tags:
            raise ValueError("Expected at least one of `tags`, got none.")

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return 1.0 or 0.0."""
        text = preds.text
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(text.count(mark) != 1 for mark in marks):
            return 0.0
        sections = r"\s*".join(rf"<{re.escape(tag)}>.*</{re.escape(tag)}>" for tag in self.tags)
        return float(re.fullmatch(rf"\s*{sections}\s*", text, re.DOTALL) is not None)


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else [str(word) for word in words]
