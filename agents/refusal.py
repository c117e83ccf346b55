"""How the command ends: its exit codes, and the errors that carry one."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """The exit codes of the command."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    NUMERICS = 3
    REWARD = 4
    STORAGE = 5
    MISSING = 6  # a package, or the one that is there is another's
    SIGNAL = 128  # plus the signal's number: 130 after Ctrl-C


class CommandError(Exception):
    """Ends the command with one line and an exit code.

    Args:
        message: What was expected, what is there, and the cure.
        code: The exit code.
    """

    def __init__(self, message: str, code: int = Exit.REFUSED) -> None:
        super().__init__(message)
        self.code = int(code)


class NumericsError(CommandError):
    """Updates are no longer finite."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.NUMERICS)


class StorageError(CommandError):
    """What had to be kept could not be written."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.STORAGE)


class Interrupted(CommandError):
    """A signal asked to stop, and the run is saved as far as it can be."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, Exit.SIGNAL + signal_number)


class StageStopped(KeyboardInterrupt):
    """A signal asked to stop training before PPO, and its state is saved.

    Args:
        message: After which step, and how to go on.
        signal_number: The signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = Exit.SIGNAL + signal_number
