"""The prompt of tasks that have none: the token that stands between texts."""

from __future__ import annotations

from textenv.tokenizer import Tokenizer


def opening(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the one prompt of a task that has none: the tokenizer's end token, as token ids.

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
