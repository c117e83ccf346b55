"""What is said when something could not be written: what it needs, what there is, and where."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full: what could not be written is tried again."""
    return isinstance(error, OSError) and error.errno in FULL


def explain(error: Exception, path: str | os.PathLike[str], n_bytes: int = 0) -> str:
    """Say why something could not be written: with a full disk, what it needs and what there is.

    Args:
        error: What was raised.
        path: Where to; the one that the error names comes first.
        n_bytes: About how many bytes it takes, 0 where nobody knows.
    """
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
    named = error.filename if isinstance(error, OSError) else None
    place = named if isinstance(named, str) else os.fspath(path)
    free = free_bytes(place)
    if number in FULL or n_bytes > free:
        needs = f"needs {size(n_bytes)}, " if n_bytes else ""
        return f"{needs}{size(free)} free at {place} ({reason})."
    return f"{reason} at {place}."


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return the room on the disk of a path that need not be there yet, in bytes."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def size(n_bytes: int) -> str:
    """Return a number of bytes for people.

    Example:
        >>> size(1_234_000_000), size(56_000)
        ('1.2 GB', '0.1 MB')
    """
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
