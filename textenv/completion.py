"""What the policy has written so far: token ids at hand, text only when looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from textenv.episode import EndReason, cut_at_stop_string
from textenv.tokenizer import Tokenizer, decode_continuation


class Turn(NamedTuple):
    """One turn of the policy and what the environment answered (None while it has not)."""

    text: str
    response: str | None


class Preds(Sequence[int]):
    """The tokens that the policy generated in an episode; what `get_reward` and `respond` look at.

    A sequence of token ids: `len(preds)`, `preds[-1]`. It is a snapshot: keeping it is safe.

    Attributes:
        ids: The ids, read-only, (T,) int64: exactly the actions taken, the end token included.
        state: A dict of your own that lives as long as the episode.
        lane: Which row of the environment this is.
        group: The number of its group: the episodes of one draw of a prompt (`TextEnv(samples_per_prompt=...)`).
        end_reason: Why the current turn is over, or None while it is not.

    Example:
        >>> from textenv.tokenizer import CharTokenizer
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
        self.ids = np.array(ids, dtype=np.int64)
        self.ids.flags.writeable = False
        self._context = np.array(context, dtype=np.int64)
        self._turn_length = len(self.ids) if turn_length is None else turn_length
        self._closed = tuple(closed)
        self.end_reason = end_reason
        self._stop_strings = stop_strings
        self.state = {} if state is None else state
        self.lane = lane
        self.group = group
        self._text: str | None = None

    @property
    def turn_ids(self) -> np.ndarray:
        """The ids of the current turn alone, read-only; those of all turns are `ids`."""
        return self.ids[len(self.ids) - self._turn_length :]

    @property
    def text(self) -> str:
        """The text that the policy wrote, without end token and stop string; turns are joined by a newline.

        Prompt and text put together read as the whole: the space in front of the first word is kept.
        """
        if self._text is None:
            self._text = "\n".join(turn.text for turn in self.turns)
        return self._text

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The policy's turns with the environment's answers; the last is the current one."""
        if self._turn_length == 0 and self._closed:
            return self._closed
        return (*self._closed, Turn(self._turn_text(), None))

    def _turn_text(self) -> str:
        ids = self.turn_ids.tolist()
        if self.end_reason is EndReason.EOS:
            ids = ids[:-1]
        text = decode_continuation(self._tokenizer, self._context.tolist(), ids)
        return cut_at_stop_string(text, self._stop_strings) if self.end_reason is EndReason.STOP else text

    def state_dict(self) -> dict[str, Any]:
        """Return what the constructor takes besides tokenizer and stop strings, as what goes into JSON."""
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
        """Return how many tokens the policy has generated."""
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        """Return the id at `index`, or a list of ids for a slice."""
        return self.ids[index].tolist()

    def __repr__(self) -> str:
        """Return the text, which is what one wants to see in a debugger."""
        return f"Preds({self.text!r}, n_tokens={len(self)})"
