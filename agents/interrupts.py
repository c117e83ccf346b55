"""Signals that ask a run to stop: the first is noted, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from .refusal import Exit

WATCHED = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"


def write_line(text: str) -> None:
    """Write a line on the standard error, in one call, as the handler of a signal may."""
    os.write(2, f"{text}\n".encode())


class Interrupts:
    """Notes SIGINT and SIGTERM while it is entered.

    Args:
        tell: What is called with a line for the person, inside the handler: it must not wait for a lock.
        how_to_go_on: What says, when a second signal ends the process, what can be done then.

    Attributes:
        number: The signal that came, 0 until then.
    """

    def __init__(self, tell: Callable[[str], None] = write_line, how_to_go_on: Callable[[], str] = str) -> None:
        self.number, self.tell, self.how_to_go_on = 0, tell, how_to_go_on
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._old = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:  # checkpoints are written beside and renamed: the last one is whole
            write_line(f"{SHOW_CURSOR if os.isatty(2) else ''}stopped at once; {self.how_to_go_on()}")
            os._exit(Exit.SIGNAL + number)
        self.number = number
        self.tell("stopping when this iteration is done and saved; once more stops at once")
