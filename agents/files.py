"""Writing so that nothing is ever half-written: beside, to the disk, then renamed."""

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
    """Yield an empty folder beside `folder` to write into, and put it in its place when all went well.

    Files are on the disk before the rename. On an error what was there stays, and what was written is removed. A
    process that is killed between two renames leaves what was there beside it: `restore_folder` puts it back.

    Raises:
        NotADirectoryError: If `folder` exists and is a file.
        OSError: If it cannot be written, with its path where the system names none.
    """
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"Expected a folder to write to, got the file {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(target)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
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
    """Put back, or remove, what processes that were killed while they wrote a folder have left beside it."""
    target = Path(folder).absolute()
    _clear(target.parent.glob(f".{glob.escape(target.name)}.*-*"), _is_running)


def clear_leftovers(folder: Path) -> None:
    """Do so for all that a folder holds, of which nothing may be in the making: the caller has it locked."""
    _clear(folder.glob(".*.*-*"), lambda pid: False)


def _clear(paths: Iterator[Path], is_writing: Callable[[int], bool]) -> None:
    for path in sorted(paths):
        left = re.fullmatch(r"\.(.+)\.(partial|old)-(\d{1,9})", path.name, re.ASCII)
        if left is None or is_writing(int(left[3])):
            continue
        target = path.with_name(left[1])
        if left[2] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say in an error of writing which path it is about, where the system has not."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
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
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, which appears whole or stays as it was; folders above it are made."""
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
