"""The command `textenv report`: one page of what happened in runs, once or for as long as a run goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence

from textenv.text.printable import printable

from ..errors import CommandError, Exit
from ..report.report import target_of, write_report
from ..runs.groups import grouped

EVERY = 5  # seconds between two looks at the files of a run that goes on


def report(paths: Sequence[str], out: str | None, watch: bool) -> int:
    """Write the report of runs, print where it is, and return the exit code.

    Args:
        paths: The folders of runs, or of the runs of several seeds.
        out: The file to write; None for report.html in the folder, or here for several folders.
        watch: Whether to write it again whenever a run has gone on, until all runs are finished.

    Raises:
        CommandError: If a folder is no run, a file in it is damaged, or `out` is another kind of file.
    """
    target = target_of(paths, out)
    runs = [run for members in grouped(paths).values() for run in members]
    seen = None
    while watch and not all(run.is_finished() for run in runs):
        sizes = [run.metrics.stat().st_size if run.metrics.is_file() else 0 for run in runs]
        if sizes != seen:
            try:
                write_report(paths, out, live=EVERY)
            except CommandError:  # a file that the run is writing now; the report at the end would raise it again
                if seen is None:
                    raise
            if seen is None:
                print(printable(f"report: {target} (rewritten until the run ends; Ctrl-C ends this)"), flush=True)
            seen = sizes
        time.sleep(EVERY)
    print(printable(f"report: {write_report(paths, out)}"), flush=True)
    return Exit.DONE
