"""The exit codes of the command, and the errors that end it with one."""

from __future__ import annotations

import errno
from enum import IntEnum

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, over the user's quota, over the file's limit


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full: the write is then tried again later."""
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
    SIGNAL = 128  # plus the signal's number, as shells have it: 130 after Ctrl-C


class CommandError(Exception):
    """An error that ends the command with one line and an exit code.

    Args:
        message: What was expected, what is there, and the cure.
        code: The exit code.
    """

    def __init__(self, message: str, code: int = Exit.REFUSED) -> None:
        super().__init__(message)
        self.code = int(code)


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
        message: After how many tokens it stopped, and how to go on.
        signal_number: The signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, Exit.SIGNAL + signal_number)


class StageStopped(KeyboardInterrupt):
    """A signal has stopped a stage of training before PPO, whose state is saved.

    A KeyboardInterrupt, so that a script which calls the stage ends as after Ctrl-C.

    Args:
        message: After which step it stopped, and how to go on.
        signal_number: The signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = Exit.SIGNAL + signal_number
