"""Files and folders that are never half-written: made under another name, synced to the disk, then renamed."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replaced_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to write into; after the body, rename it to `folder`.

    Files are synced before the rename. After an error the old folder stays, and the new one is removed. A process that
    is killed between the two renames leaves the old folder under a hidden name: `restore_folder` puts it back.

    Raises:
        NotADirectoryError: If `folder` exists and is a file.
        OSError: If it cannot be written; the error always names a path.

    Example:
        >>> import tempfile
        >>> from agents.files import replaced_folder
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with replaced_folder(f"{parent}/run") as beside:
        ...         _ = (beside / "notes.txt").write_text("whole")
        ...     print([path.name for path in Path(parent).glob("**/*")])
        ['run', 'notes.txt']
    """
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"Expected a folder to write to, got the file {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(target)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")  # where the old folder waits during the rename
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        with naming(target):
            yield beside
            for path in sorted(beside.rglob("*")):
                sync(path)
            sync(beside)
        if target.exists():
            target.rename(aside)
        beside.rename(target)
        sync(target.parent)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def restore_folder(folder: str | os.PathLike[str]) -> None:
    """Put back, or remove, the hidden folders that killed processes left beside a folder while they replaced it."""
    target = Path(folder).absolute()
    _clear(target.parent.glob(f".{glob.escape(target.name)}.*-*"), _is_running)


def clear_leftovers(folder: Path) -> None:
    """Clear up like `restore_folder` in a whole folder that the caller has locked, so that nobody else writes in it."""
    _clear(folder.glob(".*.*-*"), lambda pid: False)


def _clear(paths: Iterator[Path], is_writing: Callable[[int], bool]) -> None:
    """Put old folders back if their target is missing; remove the others, except those that are still being written."""
    for path in sorted(paths):
        leftover = re.fullmatch(r"\.(.+)\.(partial|old)-(\d{1,9})", path.name, re.ASCII)
        if leftover is None or is_writing(int(leftover[3])):
            continue
        target = path.with_name(leftover[1])
        if leftover[2] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 is never sent: the call only checks that the process exists
    except ProcessLookupError:
        return False
    except PermissionError:  # the process exists and belongs to another user
        return True
    return True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, add a path to errors of writing that name none.

    Raises:
        OSError: In place of a SafetensorError, with the error number in its text.
    """
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))  # the format of Rust's `std::io::Error`
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):  # 1 MiB at a time: a file may be larger than memory
            digest.update(block)
    return digest.hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8), which appears whole or stays as it was; make missing folders above it."""
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with naming(target):
            beside.write_text(text, encoding="utf-8")
            sync(beside)
            beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    sync(target.parent)
