"""The exit code and the one line with which the command ends after any error."""

from __future__ import annotations

import errno
from pathlib import Path

from safetensors import SafetensorError

from textenv.episodes.scores import RewardError

from ..checkpoints.storage import explain
from ..errors import FULL, CommandError, Exit

# The error numbers of failed writing. Others, such as ENOENT for a file that the user names, are refusals.
WRITING = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
SIZES = (MemoryError, OverflowError, RecursionError)  # the errors for values that are too large
REFUSALS = (OSError, ValueError, TypeError)  # the errors by which our code refuses input: "Expected X, got Y"


def as_command_error(error: BaseException, path: Path) -> CommandError:
    """Return an error as one line and an exit code.

    Args:
        error: The error that was raised; a `CommandError` is returned as it is.
        path: The folder that was written to, for errors of writing that name no path.

    Example:
        >>> from pathlib import Path
        >>> from agents.runs.exit_codes import as_command_error
        >>> as_command_error(FloatingPointError("Expected finite weights, got a NaN."), Path("run")).code
        3
    """
    if isinstance(error, CommandError):
        return error
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, RewardError):
        return CommandError(line, Exit.REWARD)
    if isinstance(error, FloatingPointError):
        return CommandError(line, Exit.NUMERICS)
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in WRITING):
        return CommandError(explain(error, path), Exit.STORAGE)
    if isinstance(error, ImportError):
        return CommandError(line, Exit.MISSING)
    if isinstance(error, REFUSALS):
        return CommandError(line, Exit.REFUSED)
    if isinstance(error, SIZES):
        return CommandError(f"Expected sizes that this machine can hold, got {type(error).__name__}: {line}")
    return CommandError(f"{type(error).__name__}: {line}", Exit.FAILED)
