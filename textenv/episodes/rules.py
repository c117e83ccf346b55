"""The rules of an episode: its limits, and the tokens and texts that end a turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np

SEPARATOR = -2  # in an observation, marks the end of the prompt
PADDING = -1  # in an observation, fills the positions after the last token


class EndReason(StrEnum):
    """The reason why an episode ended."""

    EOS = "eos"
    """The policy wrote one of `stop_ids`."""
    STOP = "stop"
    """The policy wrote one of `stop_strings`."""
    LENGTH = "length"
    """The policy wrote as many tokens as it may, another turn does not fit, or `respond` returned this reason."""
    ENV = "env"
    """The env ended it: `respond` returned None, or the last of `max_turns` turns is over."""


@dataclass(frozen=True)
class EpisodeRules:
    """The limits of turns and episodes, in tokens, and the tokens and texts that end a turn.

    Args:
        stop_ids: Token ids that end a turn; they are part of its ids, not of its text.
        stop_strings: Texts that end a turn as soon as they appear.
        max_new_tokens: The most tokens that the policy writes in an episode, over all its turns.
        length_limit: Whether reaching `max_new_tokens` terminates or truncates the episode.
        max_turns: The most turns of the policy.
        max_response_tokens: The most tokens of one reply of the env.
        turn_tokens: The most tokens of a turn; `max_new_tokens` then counts replies as well. None for no such limit.
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
        """The most tokens of an observation after its separator: the policy's turns, and the replies between them."""
        return self.max_new_tokens + (self.max_turns - 1) * self.max_response_tokens

    @property
    def tail_tokens(self) -> int:
        """The number of latest tokens in which a stop string that has just appeared must lie.

        A token writes at least one byte, so the longest stop string needs as many tokens as it has bytes. 4 are added,
        the most bytes of a UTF-8 character, since the first token may begin within a character.
        """
        return max((len(text.encode()) for text in self.stop_strings), default=0) + 4


def ended_turns(
    rules: EpisodeRules,
    actions: np.ndarray,
    generated: np.ndarray,
    limits: np.ndarray,
    tail: Callable[[int], str],
) -> dict[int, EndReason]:
    """Return the rows whose turn ends with the token just written, each with the reason.

    Where several reasons hold, EOS takes precedence over STOP, and STOP over LENGTH.

    Args:
        rules: The rules.
        actions: The token that each row has just written, (B,).
        generated: The number of tokens that the policy has written in each row, this one included, (B,).
        limits: The most tokens of each row, (B,).
        tail: A function from a row to the text of its turn's last tokens; only called if there are stop strings.
    """
    # Later reasons overwrite earlier ones.
    ends = {int(row): EndReason.LENGTH for row in np.flatnonzero(generated >= limits)}
    if rules.stop_strings:  # decoding is slow: no text is needed without them
        for row in range(len(actions)):
            text = tail(row)
            if any(stop in text for stop in rules.stop_strings):
                ends[row] = EndReason.STOP
    ends.update((int(row), EndReason.EOS) for row in np.flatnonzero(np.isin(actions, rules.stop_ids)))
    return ends


def cut_at_stop_string(text: str, stop_strings: tuple[str, ...]) -> str:
    """Return `text` up to the first stop string in it."""
    starts = [start for stop in stop_strings if (start := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text
