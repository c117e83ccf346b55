"""The prompt of tasks without prompts: the end token, which separates texts in a model's training data."""

from __future__ import annotations

from textenv.text.tokenizer import Tokenizer


def opening(tokenizer: Tokenizer) -> list[list[int]]:
    """Return a list of one prompt, the ids of the tokenizer's end token alone.

    Raises:
        ValueError: If the tokenizer has no end token.

    Example:
        >>> from textenv import CharTokenizer
        >>> opening(CharTokenizer("ab"))
        [[0]]
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("Expected a tokenizer with an end token, which opens the texts of this task: pass `prompts`.")
    return [[tokenizer.eos_token_id]]
