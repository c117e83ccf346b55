"""What a run shows in a terminal: progress, the figures of the last iteration, and what the policy writes now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from textenv.printable import printable

from .screens import Remaining, clock, figures

Row = dict[str, Any]
N_SAMPLES = 4


class LiveScreen:
    """A view that stays in place while it changes; what is said scrolls above it.

    Control characters and markup in what a model wrote are shown, not obeyed.

    Args:
        total: Tokens of the whole run.
        console: Where to show it; rich's default console.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.remaining = Remaining(total)
        columns = (
            TextColumn("{task.completed:,} / {task.total:,} tokens"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("", total=total, left="")
        self.last: dict[str, str] = {}
        self.texts: Sequence[Row] = ()
        self.last_note = ""
        self.live = Live(get_renderable=self._view, console=console, refresh_per_second=4, transient=False)

    def say(self, text: str) -> None:
        """Print a line above the view."""
        self.live.console.print(Text(printable(text)))

    def note(self, text: str) -> None:
        """Show a line below the view, as the handler of a signal may: what is written past it would be overwritten."""
        self.last_note = text

    def row(self, row: Row) -> None:
        """Show an iteration's figures."""
        left = self.remaining.seconds(row["tokens"])
        self.progress.update(self.task, completed=row["tokens"], left="" if left is None else f"{clock(left)} left")
        self.last |= figures(row)
        if row.get("eval/reward") is not None:
            self.last["evaluated"] = f"{row['eval/reward']:.3f}"
        self._show()

    def samples(self, rows: Sequence[Row]) -> None:
        """Show what the policy writes."""
        self.texts = rows[:N_SAMPLES]
        self._show()

    def close(self) -> None:
        """Leave the last view standing, and the terminal as it was."""
        if self.live.is_started:
            self.live.stop()

    def _show(self) -> None:
        if not self.live.is_started:
            self.live.start()
        self.live.refresh()

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(label, "dim") for label in self.last))
        table.add_row(*self.last.values())
        written = Table.grid(padding=(0, 2))
        for row in self.texts:
            text = Text.assemble((printable(row["prompt"]), "dim"), printable(row["text"]))
            written.add_row(f"{row['reward']:.2f}", text)
        return Group(
            self.progress.get_renderable(), table, written, *([Text(self.last_note)] if self.last_note else [])
        )
