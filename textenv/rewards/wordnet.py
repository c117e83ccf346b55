"""nltk's WordNet, if its data is installed, and an empty WordNet that replaces it in METEOR."""

from __future__ import annotations

from typing import Any

from textenv.checks.extras import needs


class NoWordNet:
    """A WordNet in which no word has a synonym."""

    def synsets(self, word: str) -> tuple[()]:
        """Return the meanings of a word: none."""
        return ()


def installed_wordnet() -> Any | None:
    """Return nltk's WordNet, or None if its data is not installed.

    Raises:
        ImportError: If nltk is not installed.
    """
    with needs("overlap", "nltk", "METEOR"):
        from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:  # nltk `data.find`: the data was not downloaded
        return None
    return wordnet
