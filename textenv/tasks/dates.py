"""The synthetic task of writing a date, with RL4LMs' reward (Ramamurthy et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from textenv.env import TextEnv
from textenv.prompts.prompts import PromptLike
from textenv.rewards.rules import Regex
from textenv.tasks.opening import opening
from textenv.text.named_tokenizer import read_tokenizer
from textenv.text.tokenizer import Tokenizer

DATE = r"\d{4}-\d{2}-\d{2}"


class Dates(TextEnv):
    """Texts that earn 1 at their end if they hold a date: `gym.make("textenv/Dates-v0", tokenizer=...)`.

    A date is four, two and two digits with hyphens between them, anywhere in the text ("due on 2014-03-07"), whether or
    not the day exists. The reward is RL4LMs' `sentences_with_dates`. The task needs no data: every episode has the same
    prompt, the tokenizer's end token, with which GPT-2's training texts begin.

    Args:
        tokenizer: The language model's tokenizer.
        prompts: Other prompts, in any form that `TextEnv` takes.
        max_new_tokens: The most tokens of a text.
        **kwargs: Other arguments of `TextEnv`, except `reward`.

    Raises:
        ValueError: If the tokenizer has no end token and `prompts` are missing, or if `TextEnv` raises it.

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
