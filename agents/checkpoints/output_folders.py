"""The rule for every folder that we write for a user: only an earlier output of ours is ever replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from textenv.checks.json_files import read_json

from ..files import replaced_folder, write_text

MARK = "textenv.json"  # names the kind of an output and each file that was written with it
SHOWN = 3  # names of files that an error shows: enough to recognise a folder
RUN = "run.json"  # the file that marks the folder of a run

Kind = Literal["language model", "classifier", "reward model", "critic", "checkpoint", "best model"]


class OutputFolderError(ValueError):
    """A folder cannot be written to, since files in it would be lost."""


def check_output(
    folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False, keep: Collection[str | os.PathLike[str]] = ()
) -> Path:
    """Check that an output may be written to a folder, and return its path with symbolic links resolved.

    An absent or empty folder may be written to. A folder with an earlier output of the same kind, and nothing else, may
    be replaced with `overwrite`. Every other folder is refused. The working directory, the home folder, the folders
    above these two, and the folder of a run are always refused.

    Args:
        folder: The folder to write to.
        kind: The kind of output.
        overwrite: Whether an earlier output of that kind may be replaced.
        keep: Other folders, such as the run that is exported; neither they nor folders above them may be replaced.

    Raises:
        OutputFolderError: If files would be lost; the message names up to three of them.
        NotADirectoryError: If the path is a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "thesis.tex").write_text("Years of work")
        ...     check_output(folder, "language model", overwrite=True)
        Traceback (most recent call last):
        ...
        agents.checkpoints.output_folders.OutputFolderError: Expected a new or empty folder ..., got ... thesis.tex: ...
    """
    target = Path(folder).expanduser().resolve()
    kept = {
        "the working directory": Path.cwd(),
        "the home folder": Path.home(),
        **{f"the folder {other}": Path(other) for other in keep},
    }
    for name, path in kept.items():
        if path.resolve().is_relative_to(target):
            where = "is" if path.resolve() == target else "is above"
            raise OutputFolderError(
                f"Expected a folder that the {kind} has for itself, got {folder}, which {where} {name}: name another."
            )
    if not target.exists():
        return target
    if not target.is_dir():
        raise NotADirectoryError(f"Expected a folder to write to, got the file {target}.")
    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir())
    if not names and not any(target.iterdir()):  # no files, and no empty folders either
        return target
    if (target / RUN).exists():
        raise OutputFolderError(f"Expected a new or empty folder for the {kind}, got {folder}, which is a run.")
    earlier = _read_mark(target)
    if earlier is None or earlier[0] != kind:
        label = "" if earlier is None else f", an earlier {earlier[0]}"
        raise OutputFolderError(
            f"Expected a new or empty folder for the {kind}, got {folder}{label} with {_shown(target)}: name another."
        )
    foreign = [name for name in names if name not in earlier[1]]
    if foreign:
        raise OutputFolderError(
            f"Expected a new or empty folder for the {kind}, got {folder} with {', '.join(foreign[:SHOWN])}, no part "
            f"of the {kind} that is there: name another folder, or move what would be lost."
        )
    if not overwrite:
        raise OutputFolderError(
            f"Expected a new or empty folder for the {kind}, got {folder}, an earlier {kind} with {_shown(target)}: "
            "--overwrite (in Python, overwrite=True) replaces it; or name another folder."
        )
    return target


@contextmanager
def output_folder(
    folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False, keep: Collection[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """Yield an empty folder to write an output into; without an error it is marked as ours and renamed to `folder`.

    Arguments and errors are those of `check_output`. Long work calls that before it begins, too, so as to fail early.

    Example:
        >>> import tempfile
        >>> from agents.checkpoints.output_folders import output_folder
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with output_folder(f"{parent}/classifier", "classifier") as beside:
        ...         _ = (beside / "config.json").write_text("{}")
        ...     print(sorted(path.name for path in Path(parent, "classifier").iterdir()))
        ['config.json', 'textenv.json']
    """
    target = check_output(folder, kind, overwrite, keep)
    with replaced_folder(target) as beside:
        yield beside
        files = sorted(path.relative_to(beside).as_posix() for path in beside.rglob("*") if not path.is_dir())
        write_text(beside / MARK, json.dumps({"kind": kind, "files": [*files, MARK]}, indent=1) + "\n")


def _read_mark(folder: Path) -> tuple[str, list[str]] | None:
    """Return the kind and the files of an earlier output; None if the folder has no intact mark of ours."""
    try:
        mark = read_json(folder / MARK, {"kind": str, "files": [str]})
    except (OSError, ValueError):
        return None
    return (mark["kind"], mark["files"]) if mark["kind"] in get_args(Kind) else None


def _shown(folder: Path) -> str:
    """Return the first names in a folder, and the number of the others, for an error."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
