"""Free space on a disk, and the explanation of why a file could not be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import FULL


def explain(error: Exception, path: str | os.PathLike[str], n_bytes: int = 0) -> str:
    """Return a sentence that says why something could not be written; for a full disk, it has the free space.

    Args:
        error: The error that was raised.
        path: The file or folder that was written to, unless the error names one itself.
        n_bytes: The approximate number of bytes that were to be written; 0 if unknown.

    Example:
        >>> import errno
        >>> from agents.checkpoints.storage import explain
        >>> explain(OSError(errno.EROFS, "Read-only file system", "/mnt/run.json"), "/mnt")
        'Read-only file system at /mnt/run.json.'
    """
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
    named = error.filename if isinstance(error, OSError) else None
    target = named if isinstance(named, str) else os.fspath(path)  # `filename` is a number for a file descriptor
    free = free_bytes(target)
    if number in FULL or n_bytes > free:
        needs = f"needs {size(n_bytes)}, " if n_bytes else ""
        return f"{needs}{size(free)} free at {target} ({reason})."
    return f"{reason} at {target}."


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return the free space on the disk of a path, which need not exist yet, in bytes."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def size(n_bytes: int) -> str:
    """Return a number of bytes as text, in GB or MB (powers of ten).

    Example:
        >>> size(1_234_000_000), size(56_000)
        ('1.2 GB', '0.1 MB')
    """
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
