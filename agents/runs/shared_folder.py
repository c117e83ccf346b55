"""The folder of a run that several processes train: rank 0 makes, locks and writes it, and the others read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..distributed.collectives import from_main, raise_together
from ..distributed.world import is_main_process
from ..errors import CommandError
from .folder import RunFolder


def create_folder(out: str | None, name: str) -> RunFolder:
    """Make the folder of a new run as `RunFolder.create` does, and return it in all processes.

    Raises:
        CommandError: In rank 0, if it cannot be made; a `ProcessLost` in the other processes.
    """
    run, error = None, None
    if is_main_process():
        try:
            run = RunFolder.create(out, name)
        except CommandError as caught:
            error = caught
    raise_together(error)
    path, was_empty = from_main("the folder of a run", None if run is None else (run.path, run.was_empty))  # type: ignore[misc]
    if run is None:
        run = RunFolder(path)
        run.was_empty = was_empty
    return run


@contextmanager
def locked_folder(run: RunFolder) -> Iterator[None]:
    """Within, rank 0 has locked the folder of a run for all processes.

    Raises:
        CommandError: In rank 0, if it cannot be locked; a `ProcessLost` in the other processes.
    """
    with ExitStack() as stack:
        error = None
        if is_main_process():
            try:
                stack.enter_context(run.locked())
            except CommandError as caught:
                error = caught
        raise_together(error)
        yield


def check_shared(run: RunFolder) -> None:
    """Check that this process sees the folder that rank 0 has made.

    Raises:
        CommandError: If it does not.
    """
    if not run.about.is_file():
        raise CommandError(
            f"Expected the folder {run.path.absolute()}, which rank 0 has made, got none here: --out must name a "
            "folder on a disk that all processes share."
        )
