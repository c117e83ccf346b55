"""The doctor's report: the findings of all checks, and the error that names the failed ones."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "failed", "skipped"]
STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


class Finding(NamedTuple):
    """The outcome of one check.

    Attributes:
        name: The name of the check.
        status: "ok"; "failed" if training would be wrong; "warning" if it may go badly; "skipped" if the check does
            not apply.
        measured: The figures that were compared.
        cause: The likely cause; empty if nothing is wrong.
        cure: The change that mends it; empty if nothing is wrong.
    """

    name: str
    status: Status
    measured: str
    cause: str = ""
    cure: str = ""

    def __str__(self) -> str:
        """Return the finding as lines of plain text."""
        lines = [f"{self.status:8}{self.name:18}{self.measured}"]
        lines += [f"{'':26}cause: {self.cause}"] if self.cause else []
        lines += [f"{'':26}cure: {self.cure}"] if self.cure else []
        return "\n".join(lines)


class DoctorError(RuntimeError):
    """Training would be wrong: the message names each failed check, its cause and its cure."""


class Report(NamedTuple):
    """All findings of an examination: `print(report)` writes plain text, `report.print()` a table on a terminal.

    Args:
        findings: The findings, in the order of the checks.

    Example:
        >>> report = Report((Finding("ratio", "ok", "largest |log ratio| 0"),))
        >>> report.ok
        True
        >>> print(report)
        ok      ratio             largest |log ratio| 0
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return not self.failed

    @property
    def failed(self) -> list[Finding]:
        """The findings that failed."""
        return [finding for finding in self.findings if finding.status == "failed"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that warn."""
        return [finding for finding in self.findings if finding.status == "warning"]

    def raise_if_failed(self) -> None:
        """Raise an error if a check failed.

        Raises:
            DoctorError: If a check failed; the message names each failed check with cause and cure.
        """
        if self.failed:
            names = ", ".join(dict.fromkeys(finding.name for finding in self.failed))
            lines = "\n".join(map(str, self.failed))
            raise DoctorError(f"Expected a model and an env that train correctly, got failures of {names}:\n{lines}")

    def warn(self) -> None:
        """Emit each warning of the report as a Python warning."""
        for finding in self.warnings:
            warnings.warn(f"{finding.name}: {finding.measured}. {finding.cause} {finding.cure}", stacklevel=3)

    def print(self, console: Console | None = None) -> None:
        """Print the report: a table on a terminal, plain lines elsewhere.

        Args:
            console: The console to print on; rich's default console if None.
        """
        console = console or Console()
        if console.is_terminal:
            console.print(self)
        else:
            console.print(str(self), markup=False, highlight=False, soft_wrap=True)

    def __str__(self) -> str:
        """Return the report as lines of plain text."""
        return "\n".join(map(str, self.findings))

    def __rich__(self) -> Table:
        """Return the report as a table for rich."""
        table = Table(show_lines=True)
        for title in ("check", "status", "measured", "cause and cure"):
            table.add_column(title)
        for finding in self.findings:
            advice = "\n".join(text for text in (finding.cause, finding.cure) if text)
            status = Text(finding.status, STYLES[finding.status])
            table.add_row(Text(finding.name), status, Text(finding.measured), Text(advice))
        return table
