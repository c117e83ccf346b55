"""The completion of a prompt, finished or not: its token ids, and its text, which is decoded when it is first read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from textenv.episodes.rules import EndReason, cut_at_stop_string
from textenv.text.tokenizer import Tokenizer, decode_continuation


class Turn(NamedTuple):
    """One turn of the policy, and the env's reply to it (None if there is none yet)."""

    text: str
    response: str | None


class Preds(Sequence[int]):
    """The tokens that the policy has written in an episode, as `get_reward` and `respond` receive them.

    The object is a sequence of token ids, `len(preds)`, `preds[-1]`, and a snapshot: you may keep it.

    Args:
        tokenizer: The tokenizer that decodes the ids.
        ids: The token ids of all turns, (T,), without the env's replies.
        context: The few token ids before the current turn, on which its decoding depends (a leading space).
        turn_length: The number of `ids` that belong to the current turn; all of them by default.
        closed: The earlier turns.
        end_reason: The reason why the current turn is over, or None while it is not.
        stop_strings: The texts that end a turn.
        state: A dict in which the env's hooks remember things about the episode.
        lane: The lane in which the episode runs.
        group: The number of its group of samples.

    Attributes:
        ids: The token ids, read-only, (T,) int64: exactly the actions taken, the end token included.
        state: A dict of your own, which lives as long as the episode.
        lane: The number of the lane.
        group: The number of the group: the episodes of one draw of a prompt (`TextEnv(samples_per_prompt=...)`).
        end_reason: The reason why the current turn is over, or None while it is not.

    Example:
        >>> from textenv import CharTokenizer
        >>> preds = Preds(CharTokenizer("ab"), ids=[1, 2, 0], end_reason=EndReason.EOS)
        >>> len(preds), preds.text
        (3, 'ab')
    """

    __slots__ = ("_closed", "_context", "_stop_strings", "_text", "_tokenizer", "_turn_length", "end_reason", "group",
                 "ids", "lane", "state")  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Sequence[int] | np.ndarray,
        *,
        context: Sequence[int] | np.ndarray = (),
        turn_length: int | None = None,
        closed: Sequence[Turn] = (),
        end_reason: EndReason | None = None,
        stop_strings: tuple[str, ...] = (),
        state: dict[str, Any] | None = None,
        lane: int = 0,
        group: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self.ids = np.array(ids, dtype=np.int64)  # (T,), a copy: the lanes keep writing into their own array
        self.ids.flags.writeable = False
        self._context = np.array(context, dtype=np.int64)
        self._turn_length = len(self.ids) if turn_length is None else turn_length
        self._closed = tuple(closed)
        self.end_reason = end_reason
        self._stop_strings = stop_strings
        self.state = {} if state is None else state
        self.lane = lane
        self.group = group
        self._text: str | None = None  # decoded when it is first read: many rewards need the ids only

    @property
    def turn_ids(self) -> np.ndarray:
        """The token ids of the current turn only, read-only, (t,) int64."""
        return self.ids[len(self.ids) - self._turn_length :]

    @property
    def text(self) -> str:
        """The text that the policy wrote, without end token and stop string; turns are joined by a newline.

        The space before the first word is kept, so that `prompt + preds.text` is the whole text.
        """
        if self._text is None:
            self._text = "\n".join(turn.text for turn in self.turns)
        return self._text

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The policy's turns with the env's replies; the last turn is the current one."""
        if self._turn_length == 0 and self._closed:  # after a reply, before the first token of the next turn
            return self._closed
        return (*self._closed, Turn(self._turn_text(), None))

    def _turn_text(self) -> str:
        ids = self.turn_ids.tolist()
        if self.end_reason is EndReason.EOS:  # a stop id may be an ordinary token, which decoding would not skip
            ids = ids[:-1]
        text = decode_continuation(self._tokenizer, self._context.tolist(), ids)
        return cut_at_stop_string(text, self._stop_strings) if self.end_reason is EndReason.STOP else text

    def state_dict(self) -> dict[str, Any]:
        """Return the arguments of the constructor apart from tokenizer and stop strings, ready for JSON."""
        return {
            "ids": self.ids.tolist(),
            "context": self._context.tolist(),
            "turn_length": self._turn_length,
            "closed": [list(turn) for turn in self._closed],
            "end_reason": None if self.end_reason is None else str(self.end_reason),
            "state": self.state,
            "lane": self.lane,
            "group": self.group,
        }

    def __len__(self) -> int:
        """Return the number of tokens that the policy has written."""
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        """Return the id at `index`, or a list of ids for a slice."""
        return self.ids[index].tolist()

    def __repr__(self) -> str:
        """Return the text and the number of tokens."""
        return f"Preds({self.text!r}, n_tokens={len(self)})"
