"""Rewards by simple rules: none, length, repetition, keywords, patterns and tagged sections."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from textenv.episodes.completion import Preds
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import RowReward, check_choice


@dataclass
class Zero(RowReward):
    """No reward, where something else trains, such as the divergence from a teacher (on-policy distillation).

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> Zero()(Prompt("a"), Preds(CharTokenizer("ab"), [1, 2]), True)
        0.0
    """

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return 0."""
        return 0.0


@dataclass
class Length(RowReward):
    """The closeness of a text's length n to a target: max(0, 1 - |n - target| / target).

    It is 1 at the target and falls linearly to 0 at an empty text and at twice the target.

    Args:
        target: The length wanted, in units of `unit`.
        unit: "tokens" (of the policy's tokenizer; the end token counts), "words" (between white space) or "characters".

    Raises:
        ValueError: If `target` is below 1 or `unit` is none of these.

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
    """A penalty for repetition within the text: minus the share of its n-grams that occurred earlier in it.

    That is (distinct n-grams / n-grams) - 1, in (-1, 0], and 0 where the text has no n-gram. The definition is from
    Yeo et al., 2025 (Demystifying Long Chain-of-Thought Reasoning in LLMs).

    Args:
        n: The length of an n-gram, in units of `unit`.
        unit: "words" (between white space), or "characters", for languages written without spaces.

    Raises:
        ValueError: If `n` is below 1 or `unit` is none of these.

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
        """Return the penalty, in (-1, 0]."""
        words = preds.text.split() if self.unit == "words" else list(preds.text)
        ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


@dataclass
class Keyword(RowReward):
    """The share of the given keywords that occur in the text, each as a whole word.

    Args:
        words: The keywords; a keyword may consist of several words ("machine learning").
        ignore_case: Whether "Good" counts as "good".
        column: The column of the prompt's row that holds its own keywords, a text or a list, instead of `words`.

    Raises:
        ValueError: If both or neither of `words` and `column` are given.

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
        # Look-arounds in place of \b, which finds no boundary after "C++": a keyword may end with punctuation.
        occurs = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", preds.text, flags) is not None for word in words]
        return sum(occurs) / len(words)


@dataclass
class Regex(RowReward):
    """1 for a text that matches a regular expression (of Python's `re`), 0 for any other.

    Args:
        pattern: The expression, maybe with inline flags, such as "(?i)yes".
        whole: Whether the whole text has to match; otherwise a match anywhere in it is enough.

    Raises:
        ValueError: If the pattern is no regular expression.

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
    """1 for a text of tagged sections, each once, in order and with only white space between them; else 0.

    The default is `<think> ... </think> <answer> ... </answer>`, the format of DeepSeek-R1 (2025, table 1).

    Args:
        tags: The names of the sections, in order.

    Raises:
        ValueError: If there are no tags.

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
        # Counted first: the pattern's `.*` would match a section that holds the tags of another.
        if any(text.count(mark) != 1 for mark in marks):
            return 0.0
        sections = r"\s*".join(rf"<{re.escape(tag)}>.*</{re.escape(tag)}>" for tag in self.tags)
        return float(re.fullmatch(rf"\s*{sections}\s*", text, re.DOTALL) is not None)


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else [str(word) for word in words]
