"""Signals that ask a run to stop: the first is noted, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from .refusal import Exit

WATCHED = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """Notes SIGINT and SIGTERM while it is entered.

    Attributes:
        number: The signal that came, 0 until then.
    """

    def __init__(self) -> None:
        self.number = 0
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
            os.write(2, f"{SHOW_CURSOR if os.isatty(2) else ''}stopped at once\n".encode())
            os._exit(Exit.SIGNAL + number)
        self.number = number
        os.write(2, b"stopping when this iteration is done and saved; once more stops at once\n")
