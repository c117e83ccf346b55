"""The exit codes of the command `textenv`, and the errors that carry one."""

from __future__ import annotations

import errno
from enum import IntEnum

# The disk is full, the user's quota is used up, the file would exceed the size limit of the system or the process.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The errors that end a verb with a line and an exit code instead of a traceback: wrong input can cause any of them.
HANDLED = (ValueError, TypeError, ImportError, OSError, ArithmeticError, MemoryError, RecursionError)


def is_full(error: BaseException | None) -> bool:
    """Return whether an error means that there is no room for a file, so that writing it again later may succeed."""
    return isinstance(error, OSError) and error.errno in FULL


class Exit(IntEnum):
    """The exit codes of the command."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    NUMERICS = 3
    REWARD = 4
    STORAGE = 5
    MISSING = 6  # a package is missing, or another package has its name
    SIGNAL = 128  # plus the signal's number, as in shells: 130 after Ctrl-C


class CommandError(Exception):
    """An error that ends the command with one line and an exit code.

    Args:
        message: The line: what was expected, what the command got, and the cure.
        code: The exit code.
    """

    def __init__(self, message: str, code: int = Exit.REFUSED) -> None:
        super().__init__(message)
        self.code = int(code)


class CommonError(CommandError):
    """An error that all processes of a job have in common, whose line names none of them."""


class NumericsError(CommandError):
    """Weights or updates are no longer finite."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.NUMERICS)


class StorageError(CommandError):
    """A file that training must keep could not be written."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.STORAGE)


class Interrupted(CommandError):
    """A signal has stopped the run, which is saved as far as possible.

    Args:
        message: The line: after how many tokens the run stopped, and how to continue it.
        signal_number: The signal, which becomes part of the exit code.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, Exit.SIGNAL + signal_number)


class StageStopped(KeyboardInterrupt):
    """A signal has stopped a training stage before PPO, whose state is saved.

    It is a KeyboardInterrupt, so that a script that calls the stage ends as it does after Ctrl-C.

    Args:
        message: The line: after which step the stage stopped, and how to continue it.
        signal_number: The signal, which becomes part of the exit code.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = Exit.SIGNAL + signal_number
