"""What is in a checkpoint's folder, file by file, so that damage is noticed before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import stable_baselines3
import torch
import transformers

from .files import sha256

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run than the model."""


def write_manifest(folder: Path, num_timesteps: int) -> None:
    """Write "manifest.json": what is in a checkpoint's folder, and the versions that wrote it."""
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
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "numpy": np.__version__,
    }


def verify_checkpoint(folder: str | os.PathLike[str]) -> int:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The number of timesteps at which it was saved.

    Raises:
        CheckpointError: Naming the file, what was expected and what is there.
    """
    path = Path(folder)
    if not (path / "manifest.json").is_file():
        raise CheckpointError(f"Expected a checkpoint in {path}, got no manifest.json there.")
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / 'manifest.json'}: no JSON, so the checkpoint is damaged ({error}).") from error
    if manifest["format"] > FORMAT:
        raise CheckpointError(f"Expected format {FORMAT} or older, got {manifest['format']}: install a newer textenv.")
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise CheckpointError(f"{file}: {found}, manifest says {entry['size']}.")
        if sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: its content is not what was written (another sha256 than the manifest's).")
    return manifest["num_timesteps"]
