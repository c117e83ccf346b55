"""The manifest of a checkpoint: the size and hash of each file, which show damage before anything is loaded."""

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

FORMAT = 3  # the version of a checkpoint's content; any other version, older or newer, is refused
MANIFEST = "manifest.json"
SHAPE = {  # for `read_json`
    "format": int,
    "num_timesteps": int,
    "versions": {str: str},
    "files": {str: {"size": int, "sha256": str}},
    "sha256": str,  # of the manifest without this entry, so that damage to the manifest itself is noticed, too
}

# The errors that loading may raise for files that match their hashes but were made by hand.
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
    """Turn a folder that was written in place into a checkpoint: sync its files to the disk, then write the manifest.

    Until the manifest is there, `verify_checkpoint` refuses the folder.
    """
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
    """Return the manifest of a checkpoint, after checking it against its own hash.

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
        CheckpointError: If a file is missing or was changed; the message names it, and its expected and actual size.
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
    """Within, turn errors of loading into a `CheckpointError`.

    After `verify_checkpoint` such an error means that somebody made the files, with their hashes, by hand.

    Args:
        folder: The checkpoint, which the message names.

    Raises:
        CheckpointError: In place of any error of `UNREADABLE`, and of safetensors.
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
    """Return the newest intact checkpoint of a folder, or None, and the damage of each newer one as a message.

    Args:
        folder: The folder that holds the checkpoints.
        name: The start of their names, as for `numbered`.
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
    """Return the checkpoints of a folder, intact or not, the highest number of steps first.

    Args:
        folder: The folder that holds the checkpoints.
        name: The start of their names, before "_" or "-" and the number of steps: "step" for "step_12". None takes
            all folders with a manifest, whatever their names, by the number of steps in the manifest.
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
    """Return the number of steps in the manifest of a checkpoint; the largest integer if the manifest is damaged."""
    try:
        return int(read_manifest(folder)["num_timesteps"])
    except CheckpointError:
        return sys.maxsize  # sorts it first, so that `newest_intact` reports its damage
