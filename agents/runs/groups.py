"""Groups of runs by the folders that name them: one run, or the runs of several seeds. It does not load torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .folder import SEED, RunFolder


def grouped(paths: Sequence[str | os.PathLike[str]]) -> dict[str, list[RunFolder]]:
    """Return the runs of each folder by the folder's name; of two with the same name, the later by its whole path.

    Raises:
        CommandError: If a folder is neither a run nor has the runs of seeds.
    """
    groups: dict[str, list[RunFolder]] = {}
    for path in paths:
        name = Path(path).resolve().name
        groups[name if name not in groups else str(path)] = runs_in(Path(path))
    return groups


def runs_in(path: Path) -> list[RunFolder]:
    """Return the run in a folder, or the runs of its seeds, in the order of their numbers.

    Raises:
        CommandError: If there is none.
    """
    if not (path / "run.json").is_file():
        seeds = [folder for folder in path.glob(f"{SEED}*") if folder.name.removeprefix(SEED).isdecimal()]
        seeds.sort(key=lambda folder: int(folder.name.removeprefix(SEED)))
        if runs := [RunFolder.open(folder) for folder in seeds if (folder / "run.json").is_file()]:
            return runs
    return [RunFolder.open(path)]
