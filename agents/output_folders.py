"""The rule of every folder that is written for a user: what exists is kept, unless it is an earlier output of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from textenv.json_files import read_json

from .files import replaced_folder, write_text

MARK = "textenv.json"  # names the kind of an output and each file that was written with it
SHOWN = 3  # names of what stands in a folder, in an error
RUN = "run.json"  # what makes a folder that of a run

Kind = Literal["language model", "classifier", "reward model", "checkpoint", "best model"]


class OutputFolderError(ValueError):
    """A folder cannot be written to, since what stands there would be lost."""


def check_output(
    folder: str | os.PathLike[str], kind: Kind, overwrite: bool = False, keep: Collection[str | os.PathLike[str]] = ()
) -> Path:
    """Return where an output of a kind may be written, with symbolic links resolved.

    A folder that is absent or empty may be. One that holds an earlier output of the same kind, and nothing else, may be
    replaced with `overwrite`. Everything else is refused, and so are, whatever is said, the working directory, the home
    folder, a run, and the folders above them.

    Args:
        folder: Where to.
        kind: What is written.
        overwrite: Whether an earlier output of that kind may be replaced.
        keep: Other folders that must not be replaced, as the run that is exported; nor those above them.

    Raises:
        OutputFolderError: If something would be lost; three of the things that stand there are named.
        NotADirectoryError: If a file stands there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "thesis.tex").write_text("Years of work")
        ...     check_output(folder, "language model", overwrite=True)
        Traceback (most recent call last):
        ...
        agents.output_folders.OutputFolderError: Expected a new or empty folder ..., got ... with thesis.tex: ...
    """
    target = Path(folder).expanduser().resolve()
    kept = {
        "the working directory": Path.cwd(),
        "the home folder": Path.home(),
        **{f"the folder {one}": Path(one) for one in keep},
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
    if not names and not any(target.iterdir()):
        return target
    if (target / RUN).exists():
        raise OutputFolderError(f"Expected a new or empty folder for the {kind}, got {folder}, which is a run.")
    earlier = _read_mark(target)
    if earlier is None or earlier[0] != kind:
        found = "" if earlier is None else f", an earlier {earlier[0]}"
        raise OutputFolderError(
            f"Expected a new or empty folder for the {kind}, got {folder}{found} with {_shown(target)}: name another."
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
    """Yield an empty folder to write an output into, which takes its place, marked as ours, when all went well.

    The arguments and errors are those of `check_output`, which long work calls before it begins.
    """
    target = check_output(folder, kind, overwrite, keep)
    with replaced_folder(target) as beside:
        yield beside
        files = sorted(path.relative_to(beside).as_posix() for path in beside.rglob("*") if not path.is_dir())
        write_text(beside / MARK, json.dumps({"kind": kind, "files": [*files, MARK]}, indent=1) + "\n")


def _read_mark(folder: Path) -> tuple[str, list[str]] | None:
    """Return the kind and the files of an earlier output; None where the folder has no whole mark of ours."""
    try:
        mark = read_json(folder / MARK, {"kind": str, "files": [str]})
    except (OSError, ValueError):
        return None
    return (mark["kind"], mark["files"]) if mark["kind"] in get_args(Kind) else None


def _shown(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
