"""The command `textenv train` with its reports: of each run, and of several seeds together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..configuration.config import TrainOptions
from ..errors import CommandError
from ..runs.plan import Plan
from ..runs.seeds import train as train_all
from .report import write_report

EVERY = 5  # the fewest seconds between two pages of a run that goes on
SHARE = 20  # and the fewest in times of what a page takes: at most a twentieth of the run's time goes into pages


def train(plans: Sequence[Plan], options: TrainOptions) -> int:
    """Train runs as `agents.runs.seeds.train` does, and write their reports; return the exit code.

    Args:
        plans: The runs: one for each seed, or a single one.
        options: The options of the command line. With --watch, a run's page is written again while it trains.
    """
    return train_all(plans, options, Reports(options.watch))


class Reports:
    """The writer of reports for `textenv train`.

    A report that cannot be written, as on a full disk, costs a line, not the run.

    Args:
        watch: Whether to write pages while a run goes on.
    """

    def __init__(self, watch: bool) -> None:
        self.watch = watch

    def of_run(self, folder: Path) -> LiveReport:
        """Return the report of a run that begins or goes on in a folder."""
        return LiveReport(folder, self.watch)

    def of_seeds(self, folder: Path) -> str:
        """Write the report of all runs of seeds in a folder; return the line that says where it is."""
        return _written(folder)


class LiveReport:
    """The report of one run of `textenv train`, written at its end, and before if it is watched.

    Args:
        folder: The run's folder.
        watch: Whether to write it while the run goes on.
    """

    def __init__(self, folder: Path, watch: bool) -> None:
        self.folder, self.watch = folder, watch
        self.due = time.monotonic()  # when the next page may be written

    def row(self, row: dict[str, Any]) -> None:
        """Write the page if the run is watched, and the last page is old enough."""
        start = time.monotonic()
        if self.watch and start >= self.due:
            with suppress(OSError, CommandError):  # a full disk, on which the run's own rows wait, too
                write_report([self.folder], live=EVERY)
            now = time.monotonic()
            self.due = now + max(EVERY, SHARE * (now - start))

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Do nothing: the next row writes them."""

    def finish(self) -> str:
        """Write the page of the finished run; return the line that says where it is."""
        return _written(self.folder)


def _written(folder: Path) -> str:
    try:
        return f"report: {write_report([folder])}"
    except (OSError, CommandError) as error:
        return f"no report: {error}"
