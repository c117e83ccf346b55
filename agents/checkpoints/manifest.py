"""The manifest of a checkpoint: size and hash of each file, by which damage is noticed before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
import transformers
from safetensors import SafetensorError

from textenv.checks.json_files import read_json

from ..files import sha256, sync

FORMAT = 2  # of what a checkpoint holds; another one is refused, older ones included
MANIFEST = "manifest.json"
SHAPE = {  # for `read_json`
    "format": int,
    "num_timesteps": int,
    "versions": {str: str},
    "files": {str: {"size": int, "sha256": str}},
    "sha256": str,  # of the manifest without this entry, so that a change of it is noticed, too
}

# What loading may raise where a file verifies and has another content than was saved.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run than the model."""


def write_manifest(folder: Path, num_timesteps: int) -> None:
    """Write "manifest.json" into a checkpoint's folder: its files, and the versions of the libraries."""
    manifest = {
        "format": FORMAT,
        "num_timesteps": num_timesteps,
        "versions": versions(),
        "files": {
            file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
    }
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def seal(folder: Path, num_timesteps: int) -> None:
    """Make a checkpoint of a folder that was written in place: sync its files to the disk, then write the manifest."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*")):
        sync(path)
    write_manifest(folder, num_timesteps)
    for path in (folder / MANIFEST, folder, folder.parent):
        sync(path)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "numpy": np.__version__,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, once it is known to be as it was written.

    Raises:
        CheckpointError: If there is none, it is of another format, or anything in it has changed.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"Expected a checkpoint in {folder}, got no {MANIFEST} there.")
    try:
        if (format := read_json(file, {"format": int})["format"]) != FORMAT:
            cure = (
                "install a newer textenv to read it" if format > FORMAT else "only the textenv that wrote it reads it"
            )
            raise CheckpointError(f"Expected format {FORMAT} in {file}, got {format}: {cure}.")
        manifest = read_json(file, SHAPE)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if _digest(manifest) != manifest["sha256"]:
        raise CheckpointError(f"{file}: its content is not what was written (another sha256 than it says itself).")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(folder: str | os.PathLike[str]) -> int:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The number of timesteps (tokens) at which it was saved.

    Raises:
        CheckpointError: With the file, what was expected and what is there.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size if file.is_file() else None
            if size != entry["size"]:
                actual = "missing" if size is None else f"{size} bytes"
                raise CheckpointError(f"{file}: {actual}, manifest says {entry['size']}.")
            if sha256(file) != entry["sha256"]:
                raise CheckpointError(
                    f"{file}: its content is not what was written (another sha256 than the manifest's)."
                )
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    return int(manifest["num_timesteps"])


@contextmanager
def of_our_making(folder: Path) -> Iterator[None]:
    """Turn errors of loading into a `CheckpointError`: the files verify and were still not saved by us, but by hand.

    Args:
        folder: The checkpoint, which the error names.

    Raises:
        CheckpointError: In place of any error within that says that a file has an unexpected content.
    """
    try:
        yield
    except CheckpointError as error:
        if str(folder) in str(error):
            raise
        raise CheckpointError(f"{folder}: {error}") from error
    except (*UNREADABLE, SafetensorError) as error:
        raise CheckpointError(
            f"Expected in {folder} what was saved there, got something else ({type(error).__name__}: {error})."
        ) from error


def newest_intact(folder: str | os.PathLike[str], name: str | None = "step") -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint of a folder that verifies, or None, and what is wrong with newer ones.

    Args:
        folder: The folder that holds the checkpoints.
        name: What their names begin with, as for `numbered`.
    """
    damage = []
    for path in numbered(folder, name):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damage.append(str(error))
        else:
            return path, damage
    return None, damage


def numbered(folder: str | os.PathLike[str], name: str | None = "step") -> list[Path]:
    """Return the checkpoints of a folder, intact or not, the newest first by the number of steps.

    Args:
        folder: The folder that holds the checkpoints.
        name: What their names begin with, before "_" or "-" and the number of steps: "step" for "step_12". None takes
            all folders that have a manifest, by the number of steps that it says.
    """
    steps: dict[Path, int] = {}
    for path in Path(folder).glob("*"):
        if name is not None:
            if number := re.fullmatch(rf"{name}[-_](\d+)", path.name, re.ASCII):
                steps[path] = int(number[1])
        elif (path / MANIFEST).is_file():
            steps[path] = _steps_of(path)
    return sorted(steps, key=lambda path: (steps[path], path), reverse=True)


def _steps_of(folder: Path) -> int:
    """Return how many steps the manifest of a checkpoint says; more than any, where the manifest is damaged."""
    try:
        return int(read_manifest(folder)["num_timesteps"])
    except CheckpointError:
        return sys.maxsize  # first, so that the damage is reported whichever checkpoint is intact
