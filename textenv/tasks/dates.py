"""A synthetic task: write a date, rewarded as in RL4LMs (Ramamurthy et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from textenv.env import TextEnv
from textenv.named_tokenizer import read_tokenizer
from textenv.prompts import PromptLike
from textenv.rewards.rules import Regex
from textenv.tasks.opening import opening
from textenv.tokenizer import Tokenizer

DATE = r"\d{4}-\d{2}-\d{2}"


class Dates(TextEnv):
    """Episodes that earn 1 when they end if there is a date in the text: `gym.make("textenv/Dates-v0", tokenizer=...)`.

    A date is four digits, two and two with hyphens between, anywhere ("due on 2014-03-07"); whether there is such a day
    does not matter. It is RL4LMs' reward `sentences_with_dates`. It needs no data: every episode begins at the same
    prompt, the tokenizer's end token, which is how GPT-2's texts begin.

    Args:
        tokenizer: The language model's.
        prompts: Other prompts, as `TextEnv` takes them.
        max_new_tokens: The most tokens of a text.
        **kwargs: Other arguments of `TextEnv`, the reward apart.

    Raises:
        ValueError: If the tokenizer has no end token and there are no `prompts`, and as `TextEnv`.

    Example:
        >>> from textenv import CharTokenizer
        >>> tokenizer = CharTokenizer("0123456789-")
        >>> env = Dates(tokenizer, max_new_tokens=10)
        >>> observation, _ = env.reset(seed=0)
        >>> sum(env.step(token)[1] for token in tokenizer.encode("2014-03-07"))
        1.0
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str | PathLike[str],
        prompts: Sequence[PromptLike] | str | PathLike[str] | None = None,
        *,
        max_new_tokens: int = 30,
        **kwargs: Any,
    ) -> None:
        tokenizer = read_tokenizer(tokenizer)
        super().__init__(
            opening(tokenizer) if prompts is None else prompts,
            tokenizer,
            reward=Regex(DATE, whole=False),
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
