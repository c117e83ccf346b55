"""The protocol of the reports that training runs write, which the room of reports, above this one, follows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


class RunReport(Protocol):
    """The report of one run: a view of its rows and samples, like a tracker, which writes a page at the end."""

    def row(self, row: Row) -> None:
        """Take note of an iteration's figures."""

    def samples(self, rows: Sequence[Row]) -> None:
        """Take note of texts of the policy."""

    def finish(self) -> str:
        """Write the report of the finished run; return the line that says where it is."""


class Reporter(Protocol):
    """The writer of reports."""

    def of_run(self, folder: Path) -> RunReport:
        """Return the report of a run that begins or goes on in a folder."""

    def of_seeds(self, folder: Path) -> str:
        """Write the report of all runs of seeds in a folder; return the line that says where it is."""
