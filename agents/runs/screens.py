"""The output of a training run: plain lines, lines of JSON, or nothing; and the display of its warnings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from textenv.text.printable import printable

from ..distributed.warned import warnings_noted
from ..signals import write_line
from .folder import to_line
from .remaining import Remaining, clock

Row = dict[str, Any]
SHOWN = (  # label, key in metrics.jsonl, format
    ("reward", "reward/task", ".3f"),
    ("kl", "kl/sequence", ".2f"),
    ("entropy", "train/entropy_loss", ".2f"),
    ("length", "episode/length", ".1f"),
    ("tokens/s", "time/tokens_per_second", ".0f"),
)

# By key in metrics.jsonl, its label in the live view.
EVALUATED = {"eval/reward": "evaluated", "eval/judge": "judge", "eval/gap": "gap"}


class Screen(Protocol):
    """A view of a training run: it shows lines, the figures of iterations, and samples."""

    def begin(self, tokens: int, rows: Sequence[Row]) -> None:
        """Begin after a number of tokens, with the rows of a resumed run."""

    def say(self, text: str) -> None:
        """Show a line."""

    def note(self, text: str) -> None:
        """Show a line; a signal handler may call this."""

    def row(self, row: Row) -> None:
        """Show the figures of an iteration."""

    def samples(self, rows: Sequence[Row]) -> None:
        """Show texts of the policy."""

    def close(self) -> None:
        """Leave the terminal as it was."""


@contextmanager
def warnings_on(screen: Screen) -> Iterator[None]:
    """Within, show each warning on a screen, at once, and note it for `warnings_of_others`.

    Example:
        >>> import warnings
        >>> with warnings_on(PlainScreen(100, 50)):
        ...     warnings.warn("the reward is constant")
        warning: the reward is constant
    """
    with warnings_noted(lambda message, *rest, **more: screen.say(f"warning: {message}")):
        yield


def figures(row: Row) -> dict[str, str]:
    """Return the figures of a row that a screen shows, by label, with the parts of the reward.

    Example:
        >>> figures({"tokens": 8, "reward/task": 0.5, "reward/mood": 0.25, "train/entropy_loss": -1.0})
        {'reward': '0.500', 'mood': '0.250', 'entropy': '1.00'}
    """
    texts = {}
    for label, key, form in SHOWN:
        if row.get(key) is not None:
            # SB3 `ppo.PPO.train` logs the entropy loss, which is minus the entropy.
            value = -row[key] if label == "entropy" else row[key]
            texts[label] = f"{value:{form}}"
        if label == "reward":
            part_keys = [name for name in row if name.startswith("reward/") and name != "reward/task"]
            texts.update({name.removeprefix("reward/"): f"{row[name]:.3f}" for name in part_keys})
    return texts


class PlainScreen:
    """One line per iteration, for output that is not a terminal.

    Args:
        total: The number of tokens of the whole run.
        every: The number of tokens between two evaluations.
    """

    def __init__(self, total: int, every: int) -> None:
        self.total, self.remaining = total, Remaining(total, every)

    def begin(self, tokens: int, rows: Sequence[Row]) -> None:
        """Start the clock of the remaining time."""
        self.remaining.begin(tokens, rows)

    def say(self, text: str) -> None:
        """Print a line."""
        print(printable(text), flush=True)

    def note(self, text: str) -> None:
        """Write a line to standard error."""
        write_line(text)

    def row(self, row: Row) -> None:
        """Print an iteration's figures in a line."""
        left = self.remaining.seconds(row)
        texts = [f"{label} {text}" for label, text in figures(row).items()]
        evaluated = [f"{name} {row[name]:.3f}" for name in EVALUATED if row.get(name) is not None]
        eta = [] if left is None else [f"left {clock(left)}"]
        self.say("  ".join([f"{row['tokens']:>9,} / {self.total:,} tokens", *texts, *evaluated, *eta]))

    def samples(self, rows: Sequence[Row]) -> None:
        """Show nothing: samples.jsonl has them."""

    def close(self) -> None:
        """Do nothing: the terminal is unchanged."""


class JsonScreen:
    """One line of JSON per iteration on standard output (`--json`); other lines go to standard error.

    Args:
        first: Keys and values that each line begins with.
    """

    def __init__(self, first: Row | None = None) -> None:
        self.first = first or {}

    def begin(self, tokens: int, rows: Sequence[Row]) -> None:
        """Do nothing: it shows no remaining time."""

    def say(self, text: str) -> None:
        """Print a line on standard error."""
        print(printable(text), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Write a line to standard error."""
        write_line(text)

    def row(self, row: Row) -> None:
        """Print a row as it is in metrics.jsonl, after the first keys."""
        print(to_line({**self.first, **row}), end="", flush=True)

    def samples(self, rows: Sequence[Row]) -> None:
        """Show nothing: samples.jsonl has them."""

    def close(self) -> None:
        """Do nothing: the terminal is unchanged."""


class QuietScreen:
    """No output (`--quiet`)."""

    def begin(self, tokens: int, rows: Sequence[Row]) -> None:
        """Do nothing: it shows no remaining time."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Write a line to standard error: it says what a signal does."""
        write_line(text)

    def row(self, row: Row) -> None:
        """Show nothing."""

    def samples(self, rows: Sequence[Row]) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing: the terminal is unchanged."""


class SilentScreen(QuietScreen):
    """No output at all: of several processes, rank 0 alone shows something."""

    def note(self, text: str) -> None:
        """Show nothing."""
