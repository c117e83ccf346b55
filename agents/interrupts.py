"""What asks a training to stop, signals and a terminal that is gone: it is noted, and obeyed once all is saved."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from .refusal import Exit
from .storage import is_full

AGAIN = (signal.SIGINT, signal.SIGTERM)  # which of them, once more, stop at once; a closed terminal hangs up twice
WATCHED = (*AGAIN, signal.SIGHUP)
SHOW_CURSOR = "\x1b[?25h"


def write_line(text: str) -> None:
    """Write a line on the standard error, in one call, as the handler of a signal may."""
    with suppress(OSError):  # of a terminal that is gone: there is nobody to tell
        os.write(2, f"{text}\n".encode())


def leave(number: int, how_to_go_on: Callable[[], str] = str) -> None:
    """End the process at once, saying what can be done: checkpoints are written beside and renamed, so one is whole."""
    write_line("; ".join(filter(None, (f"{SHOW_CURSOR if os.isatty(2) else ''}stopped at once", how_to_go_on()))))
    os._exit(Exit.SIGNAL + number)


def raise_interrupt(number: int) -> None:
    """Raise KeyboardInterrupt, as Python does itself."""
    raise KeyboardInterrupt


class Interrupts:
    """While it is entered, notes SIGINT, SIGTERM and SIGHUP, and standard output or error that nobody reads any more.

    What is written there then goes nowhere, and does not stop the training before it is saved. In another thread than
    the main one, which alone may have handlers, signals do what they did.

    Args:
        tell: What is called with a line for the person, inside the handler: it must not wait for a lock.
        unit: What is finished first.
        again: What a second SIGINT or SIGTERM does, given its number.

    Attributes:
        number: The signal that came, 0 until then: SIGPIPE for a pipe that is gone, SIGHUP for a terminal.

    Example:
        >>> import signal
        >>> with Interrupts(tell=print, unit="step") as interrupts:
        ...     signal.raise_signal(signal.SIGTERM)
        stopping when this step is done and saved; once more stops at once
        >>> interrupts.number == signal.SIGTERM
        True
    """

    def __init__(
        self,
        tell: Callable[[str], None] = write_line,
        unit: str = "iteration",
        again: Callable[[int], None] = leave,
    ) -> None:
        self.number, self.tell, self.unit, self.again = 0, tell, unit, again
        self._n_asked = 0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            # `nohup` has SIGHUP ignored, which is to stay
            watched = [one for one in WATCHED if one in AGAIN or signal.getsignal(one) is not signal.SIG_IGN]
            self._old = {number: signal.signal(number, self._note) for number in watched}
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (KeptStream(stream, self.lose) for stream in self._streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self._streams
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def lose(self, number: int) -> None:
        """Note that output is gone, by the signal that stands for it."""
        self.number = self.number or number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._n_asked += number in AGAIN
        if self._n_asked > 1:
            self.again(number)
        if not self.number:
            self.number = number
            self.tell(f"stopping when this {self.unit} is done and saved; once more stops at once")


class KeptStream:
    """A text stream whose reader may go: from then on, what is written to it goes nowhere.

    Args:
        stream: The stream. What it cannot write to a full disk stays in its buffer.
        lost: What is called when its reader is gone, with SIGPIPE for a pipe and SIGHUP for a terminal.
    """

    def __init__(self, stream: Any, lost: Callable[[int], None]) -> None:
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, and return how many characters."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what the buffer holds."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if is_full(error):
                return
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._lost(signal.SIGPIPE if error.errno == errno.EPIPE else signal.SIGHUP)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
