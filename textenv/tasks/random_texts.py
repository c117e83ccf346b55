"""Random texts with numbers or dates in them, on which a fresh model is trained before a synthetic task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from textenv.text.demo_corpus import vocabulary

WORDS = vocabulary()


def random_texts(task: str, n: int, seed: int = 0) -> list[str]:
    """Write texts of 8 to 24 words, of which 3 in 10 are numbers below 100, or 1 in 5 is a year or date in some form.

    Args:
        task: "IncreasingNumbers" or "Dates".
        n: The number of texts.
        seed: The seed of the generator.

    Raises:
        KeyError: If the task is unknown.

    Example:
        >>> texts = random_texts("IncreasingNumbers", 2)
        >>> any(word.isdigit() for word in " ".join(texts).split())
        True
    """
    rng = np.random.default_rng(seed)
    word = MAKERS[task]
    # `integers` excludes its upper bound.
    return [" ".join(word(rng) for _ in range(rng.integers(8, 25))) for _ in range(n)]


def _word(rng: np.random.Generator) -> str:
    return WORDS[rng.integers(len(WORDS))]


def _word_or_number(rng: np.random.Generator) -> str:
    return str(rng.integers(100)) if rng.random() < 0.3 else _word(rng)


def _word_or_date(rng: np.random.Generator) -> str:
    if rng.random() >= 0.2:
        return _word(rng)
    # Days end at 28, which every month has.
    year, month, day = rng.integers(1900, 2100), rng.integers(1, 13), rng.integers(1, 29)
    forms = [f"{year}", f"{day:02d}/{month:02d}/{year}", f"{year}-{year + 1}", f"{year}-{month:02d}-{day:02d}"]
    return forms[rng.integers(len(forms))]


MAKERS: dict[str, Callable[[np.random.Generator], str]] = {
    "IncreasingNumbers": _word_or_number,
    "Dates": _word_or_date,
}
