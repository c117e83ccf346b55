"""Writing so that nothing is ever half-written: beside, to the disk, then renamed."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to write into, and put it in its place when all went well.

    Files are on the disk before the rename. On an error what was there stays, and what was written is removed.

    Raises:
        NotADirectoryError: If `folder` exists and is a file.
    """
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"Expected a folder to write to, got the file {target}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
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


def _clear_leftovers(target: Path) -> None:
    """Bring back, or remove, what processes that were killed while they wrote `target` left beside it."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        kind, _, pid = path.name[len(target.name) + 2 :].partition("-")
        if kind not in ("partial", "old") or not pid.isdecimal() or _is_running(int(pid)):
            continue
        if kind == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    sync(target.parent)
