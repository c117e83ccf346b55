"""A synthetic task: write numbers in increasing order, rewarded as in RL4LMs (Ramamurthy et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from textenv.completion import Preds
from textenv.env import TextEnv
from textenv.named_tokenizer import read_tokenizer
from textenv.prompts import Prompt, PromptLike
from textenv.rewards.base import RowReward
from textenv.tasks.opening import opening
from textenv.tokenizer import Tokenizer


@dataclass
class Increasing(RowReward):
    """How much of a text is one run of increasing numbers, from its first number on.

    The words of a text stand between white space; a number is a word that Python's `float` reads ("7", "-1.5", "1e3",
    and "inf" and "nan" too). Counted are the first number and those that follow it for as long as each is larger than
    the one before; other words in between do not end the run. The reward is count / max(words, min_tokens / 2), in
    [0, 1]; 0 without a number. It is RL4LMs' reward `increasing_numbers`.

    Args:
        min_tokens: Twice the words that a text needs for the whole reward.

    Raises:
        ValueError: If `min_tokens` is not positive.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer = CharTokenizer("0123456789 a")
        >>> Increasing(8)(Prompt("a"), Preds(tokenizer, tokenizer.encode("1 a 20 3")), True)
        0.5
    """

    min_tokens: int = 20

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise ValueError(f"Expected `min_tokens` to be positive, got {self.min_tokens}.")

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the share, in [0, 1]."""
        words = preds.text.split()
        numbers = [number for word in words if (number := _number(word)) is not None]
        count = len(numbers[:1])
        # A plain comparison: with "nan" on either side it is false, and the run is over.
        while 0 < count < len(numbers) and numbers[count] > numbers[count - 1]:
            count += 1
        return count / max(len(words), self.min_tokens / 2)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class IncreasingNumbers(TextEnv):
    """Episodes that earn by `Increasing` when they end: `gym.make("textenv/IncreasingNumbers-v0", tokenizer=...)`.

    It needs no data. Every episode begins at the same prompt, the tokenizer's end token, which is how GPT-2's texts
    begin; the most possible is 1.

    Args:
        tokenizer: The language model's.
        prompts: Other prompts, as `TextEnv` takes them.
        min_tokens: Of `Increasing`.
        max_new_tokens: The most tokens of a text.
        **kwargs: Other arguments of `TextEnv`, the reward apart.

    Raises:
        ValueError: If the tokenizer has no end token and there are no `prompts`, and as `TextEnv`.

    Example:
        >>> from textenv import CharTokenizer
        >>> env = IncreasingNumbers(CharTokenizer("0123456789 "), max_new_tokens=3, min_tokens=2)
        >>> observation, _ = env.reset(seed=0)
        >>> [env.step(token)[1] for token in (2, 11, 3)]  # "1 2"
        [0.0, 0.0, 1.0]
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str | PathLike[str],
        prompts: Sequence[PromptLike] | str | PathLike[str] | None = None,
        *,
        min_tokens: int = 20,
        max_new_tokens: int = 20,
        **kwargs: Any,
    ) -> None:
        tokenizer = read_tokenizer(tokenizer)
        super().__init__(
            opening(tokenizer) if prompts is None else prompts,
            tokenizer,
            reward=Increasing(min_tokens),
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
