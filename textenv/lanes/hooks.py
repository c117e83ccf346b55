"""The protocols of the parts of an env that its lanes use: prompts, rewards and the rules of an episode.

`TextEnv` has all of them. Lanes are typed against these protocols, so that the env can import the lanes without an
import circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from textenv.episodes.completion import Preds
from textenv.episodes.failure_policy import Failures, OnFailure
from textenv.episodes.rules import EndReason, EpisodeRules
from textenv.episodes.scores import Score, ScoreAt
from textenv.masks.token_masks import TokenMask
from textenv.prompts.priority import PrioritySampling
from textenv.prompts.prompts import Order, Prompt, PromptLike
from textenv.text.tokenizer import Tokenizer
from textenv.text.vocabulary import Vocabulary


class PromptHost(Protocol):
    """An env as the prompt dealer sees it: its prompts and their order."""

    prompts: Sequence[Prompt]
    order: Order | PrioritySampling
    samples_per_prompt: int

    def draw_seed(self) -> int:
        """Return the seed of the order for a `reset` without a seed."""

    def read_prompt(self, row: PromptLike, number: int = -1) -> Prompt:
        """Return a text, row, list of token ids or chat as a checked `Prompt`."""


class RewardHost(Protocol):
    """An env as the calls of its reward see it."""

    failures: Failures

    @property
    def on_failure(self) -> OnFailure:
        """The treatment of a row whose reward fails."""

    @property
    def scores_rows_apart(self) -> bool:
        """Whether the reward of a row does not depend on the other rows of the call."""

    def get_rewards(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of several rows."""


class EpisodeHost(PromptHost, RewardHost, Protocol):
    """An env as its lanes see it: prompts, rewards, the rules of an episode, masks and replies."""

    tokenizer: Tokenizer
    rules: EpisodeRules
    masks: tuple[TokenMask, ...]
    vocabulary: Vocabulary
    max_prompt_tokens: int
    score_at: ScoreAt
    is_multi_turn: bool

    def respond(self, prompt: Prompt, preds: Preds) -> str | Literal[EndReason.LENGTH] | None:
        """Answer a turn of the policy, or end the episode."""
