"""The synthetic task of writing numbers in increasing order, with RL4LMs' reward (Ramamurthy et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.prompts.prompts import Prompt, PromptLike
from textenv.rewards.base import RowReward
from textenv.tasks.opening import opening
from textenv.text.named_tokenizer import read_tokenizer
from textenv.text.tokenizer import Tokenizer


@dataclass
class Increasing(RowReward):
    """The length of the run of increasing numbers that starts with a text's first number, as a share of its words.

    Words are separated by white space; a number is a word that Python's `float` reads ("7", "-1.5", "1e3", and also
    "inf" and "nan"). The count includes the first number and the following ones, for as long as each is larger than the
    number before it; other words between them do not end the run. The reward is count / max(words, min_tokens / 2), in
    [0, 1], and 0 without a number. This is RL4LMs' reward `increasing_numbers`.

    Args:
        min_tokens: Twice the number of words that a text needs for a reward of 1.

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
        count = len(numbers[:1])  # 1, or 0 without a number
        # The comparison is false with "nan" on either side, which ends the run.
        while 0 < count < len(numbers) and numbers[count] > numbers[count - 1]:
            count += 1
        return count / max(len(words), self.min_tokens / 2)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class IncreasingNumbers(TextEnv):
    """Texts that earn `Increasing` at their end: `gym.make("textenv/IncreasingNumbers-v0", tokenizer=...)`.

    The task needs no data: every episode has the same prompt, the tokenizer's end token, with which GPT-2's training
    texts begin. The largest reward is 1.

    Args:
        tokenizer: The language model's tokenizer.
        prompts: Other prompts, in any form that `TextEnv` takes.
        min_tokens: The argument of `Increasing`.
        max_new_tokens: The most tokens of a text.
        **kwargs: Other arguments of `TextEnv`, except `reward`.

    Raises:
        ValueError: If the tokenizer has no end token and `prompts` are missing, or if `TextEnv` raises it.

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
