"""The live view of a training run in a terminal: progress, the latest figures, and texts of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from textenv.text.printable import printable

from .remaining import Remaining, clock
from .screens import EVALUATED, figures

Row = dict[str, Any]
PROMPT_END = 60  # characters of a prompt in the view: chats and dialogues would fill it
N_SAMPLES = 4  # texts in the view: it must fit a terminal of 24 lines


class LiveScreen:
    """A view that is redrawn in place; other lines scroll above it.

    Control characters and markup in a model's texts are shown as they are, and have no effect.

    Args:
        total: The number of tokens of the whole run.
        every: The number of tokens between two evaluations.
        console: The console; by default rich's default console.
    """

    def __init__(self, total: int, every: int, console: Console | None = None) -> None:
        self.remaining = Remaining(total, every)
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
        # transient=False: the last view stays on the terminal when training ends.
        self.live = Live(get_renderable=self._view, console=console, refresh_per_second=4, transient=False)

    def begin(self, tokens: int, rows: Sequence[Row]) -> None:
        """Start the clock of the remaining time, and the bar at the tokens of a resumed run."""
        self.remaining.begin(tokens, rows)
        self.progress.update(self.task, completed=tokens)

    def say(self, text: str) -> None:
        """Print a line above the view."""
        self.live.console.print(Text(printable(text)))

    def note(self, text: str) -> None:
        """Show a line below the view when it is next redrawn. This does not print: a signal handler may call it."""
        self.last_note = text

    def row(self, row: Row) -> None:
        """Show an iteration's figures."""
        left = self.remaining.seconds(row)
        self.progress.update(self.task, completed=row["tokens"], left="" if left is None else f"{clock(left)} left")
        self.last |= figures(row)
        self.last |= {label: f"{row[key]:.3f}" for key, label in EVALUATED.items() if row.get(key) is not None}
        self._show()

    def samples(self, rows: Sequence[Row]) -> None:
        """Show texts of the policy."""
        self.texts = rows[:N_SAMPLES]
        self._show()

    def close(self) -> None:
        """Stop redrawing: the last view stays on the terminal."""
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
        samples = Table.grid(padding=(0, 2))
        for row in self.texts:
            prompt = printable(row["prompt"])
            shown = prompt if len(prompt) <= PROMPT_END else f"…{prompt[-PROMPT_END:]}"
            # A Text, not a str: rich reads markup such as [red] in a str.
            text = Text.assemble((shown, "dim"), printable(row["text"]))
            samples.add_row(f"{row['reward']:.2f}", text)
        return Group(
            self.progress.get_renderable(), table, samples, *([Text(self.last_note)] if self.last_note else [])
        )
