"""The rules of an episode, pure: given the tokens so far, which rows are over, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np

SEPARATOR = -2  # stands between the prompt and the tokens since
PADDING = -1  # fills an observation behind its last token


class EndReason(StrEnum):
    """Why an episode ended."""

    EOS = "eos"
    """The policy wrote one of `stop_ids`."""
    STOP = "stop"
    """The policy wrote one of `stop_strings`."""
    LENGTH = "length"
    """The policy wrote as many tokens as it may, there is no room for another turn, or `respond` says so."""
    ENV = "env"
    """The environment ended it: `respond` returned None, or the last of `max_turns` turns was over."""


@dataclass(frozen=True)
class EpisodeRules:
    """When a turn and an episode end.

    Args:
        stop_ids: Token ids that end a turn; they are part of it.
        stop_strings: Texts that end a turn as soon as they appear.
        max_new_tokens: The most tokens the policy writes in an episode, over all its turns.
        length_limit: Whether reaching it terminates (the default: how far one is can be seen) or truncates.
        max_turns: The most turns the policy takes.
        max_response_tokens: The most tokens of one reply of the environment.
        turn_tokens: The most tokens of a turn; `max_new_tokens` then counts replies as well. None for any.
    """

    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    max_new_tokens: int
    length_limit: Literal["terminate", "truncate"]
    max_turns: int = 1
    max_response_tokens: int = 0
    turn_tokens: int | None = None

    @property
    def room(self) -> int:
        """The most tokens behind the separator: the policy's and the replies between its turns."""
        return self.max_new_tokens + (self.max_turns - 1) * self.max_response_tokens

    @property
    def tail_tokens(self) -> int:
        """How many of the last tokens decide whether a stop string has just appeared: a token has a byte or more."""
        return max((len(text.encode()) for text in self.stop_strings), default=0) + 4


def ended_turns(
    rules: EpisodeRules,
    actions: np.ndarray,
    generated: np.ndarray,
    limits: np.ndarray,
    tail: Callable[[int], str],
) -> dict[int, EndReason]:
    """Return the rows whose turn ends with the token just written, and why; EOS before STOP before LENGTH.

    Args:
        rules: The rules.
        actions: The token that each row has just written, (B,).
        generated: How many tokens the policy has written in each row, that one included, (B,).
        limits: Each row's own limit, (B,).
        tail: Called with a row: the text of the last tokens of its current turn. Only with stop strings.
    """
    ends = {int(row): EndReason.LENGTH for row in np.flatnonzero(generated >= limits)}
    if rules.stop_strings:
        for row in range(len(actions)):
            text = tail(row)
            if any(stop in text for stop in rules.stop_strings):
                ends[row] = EndReason.STOP
    ends.update((int(row), EndReason.EOS) for row in np.flatnonzero(np.isin(actions, rules.stop_ids)))
    return ends


def cut_at_stop_string(text: str, stop_strings: tuple[str, ...]) -> str:
    """Return `text` up to the first stop string in it."""
    places = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
