"""The built-in demo as an environment: product reviews, to be continued in a good mood."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.masks.token_masks import BannedMask
from textenv.prompts.prompts import Prompt, PromptLike
from textenv.text.demo_corpus import prompts as openings
from textenv.text.demo_corpus import score
from textenv.text.named_tokenizer import DEMO
from textenv.text.tokenizer import Tokenizer


class Demo(TextEnv):
    """Reviews that earn the share of positive words among their mood words at the end: `gym.make("textenv/Demo-v0")`.

    The demo needs no data and no arguments, and all arguments can be written in a YAML file, so that programs such as
    rl_zoo3 can make it by name. Its language model is `agents.demo_model`.

    Args:
        tokenizer: The language model's tokenizer; "demo" is the tokenizer of the demo's model.
        prompts: Other prompts, in any form that `TextEnv` takes.
        max_new_tokens: The most tokens of a text.
        banned: Words that a mask forbids; they need MaskablePPO.
        **kwargs: Other arguments of `TextEnv`, except `reward`.

    Example:
        >>> import gymnasium
        >>> env = gymnasium.make("textenv/Demo-v0", max_new_tokens=2, render_mode="ansi")
        >>> _ = env.reset(seed=0)
        >>> _ = env.step(44), env.step(3)
        >>> env.render()
        'this speaker is | great .'
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str | PathLike[str] = DEMO,
        prompts: Sequence[PromptLike] | str | PathLike[str] | None = None,
        *,
        max_new_tokens: int = 20,
        banned: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if banned:
            kwargs["mask"] = BannedMask(texts=banned)
        kwargs = {"score_at": "done", **kwargs}  # a text earns nothing before its end, so it is not scored there
        rows = openings() if prompts is None else prompts
        super().__init__(rows, tokenizer, max_new_tokens=max_new_tokens, **kwargs)

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        """Return the share of positive words among the review's mood words, in [0, 1], at the end, and 0 before."""
        return score(prompt + preds.text) if done else 0.0
