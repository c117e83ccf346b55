"""Requests to stop, by a signal or a closed terminal: noted at once, obeyed when everything is saved."""

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

from .errors import Exit, is_full

AGAIN = (signal.SIGINT, signal.SIGTERM)  # a second one of these stops at once
WATCHED = (*AGAIN, signal.SIGHUP)  # a terminal that closes may send SIGHUP twice, so a second one changes nothing
SHOW_CURSOR = "\x1b[?25h"  # rich hides the cursor while a live screen is shown, and `os._exit` skips its clean-up


def write_line(text: str) -> None:
    """Write a line to standard error in one system call, without a lock: a signal handler may call this."""
    with suppress(OSError):  # the terminal may be closed: then nobody can read the line
        os.write(2, f"{text}\n".encode())


def leave(number: int, how_to_go_on: Callable[[], str] = str) -> None:
    """End the process at once, and print how to continue; older checkpoints stay intact even if one is being written.

    Args:
        number: The signal, which becomes part of the exit code.
        how_to_go_on: A function that returns the end of the printed line; by default it is empty.
    """
    write_line("; ".join(filter(None, (f"{SHOW_CURSOR if os.isatty(2) else ''}stopped at once", how_to_go_on()))))
    os._exit(Exit.SIGNAL + number)


def raise_interrupt(number: int) -> None:
    """Raise KeyboardInterrupt, as Python's own handler of Ctrl-C does."""
    raise KeyboardInterrupt


class Interrupts:
    """A context that notes a first request to stop, which training obeys once it is saved, and obeys a second at once.

    Requests are SIGINT, SIGTERM and SIGHUP, and the loss of the reader of standard output or error: further output is
    then discarded, since an error would end training before it is saved. Python lets only the main thread handle
    signals; in another thread signals do what they did before.

    Args:
        tell: A function that is called with a line for the user, in the signal handler: it must not wait for a lock.
        unit: The unit of work that is finished before training stops, for that line.
        again: A function that is called with the number of a second SIGINT or SIGTERM: `leave`, which ends the process,
            or `raise_interrupt`, for code that a script calls.

    Attributes:
        number: The number of the first signal, 0 until then; SIGPIPE stands for a broken pipe, SIGHUP for a closed
            terminal.

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
            # `nohup` starts a process with SIGHUP ignored, which must stay so.
            watched = [sig for sig in WATCHED if sig in AGAIN or signal.getsignal(sig) is not signal.SIG_IGN]
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
        """Note the loss of an output's reader, by the signal that stands for it, as a first request to stop."""
        self.number = self.number or number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._n_asked += number in AGAIN
        if self._n_asked > 1:
            self.again(number)
        if not self.number:
            self.number = number
            self.tell(f"stopping when this {self.unit} is done and saved; once more stops at once")


class KeptStream:
    """A text stream that discards all output once its reader is gone.

    Args:
        stream: The stream. While a disk is full, output stays in its buffer.
        lost: A function that is called when the reader is gone, with SIGPIPE for a pipe and SIGHUP for a terminal.
    """

    def __init__(self, stream: Any, lost: Callable[[int], None]) -> None:
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, and return its number of characters."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write the content of the buffer."""
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
            # /dev/null takes over the descriptor, so that the rest of the buffer and C code's output go there, too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
