"""The progress of long work: a bar in a terminal or a notebook, and seldom a plain line anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import auto
from tqdm.asyncio import tqdm_asyncio
from tqdm.std import tqdm

SECONDS_OF_A_LINE = 30.0  # between two lines: a log of a night has about a thousand, and short work none
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left{postfix}"


class ProgressLines(tqdm):
    """A bar of tqdm for pipes and log files: a line every half minute, without carriage returns."""

    monitor_interval = 0  # no thread that redraws: lines come with updates alone

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the line of now; `close` asks to clear a bar by an empty message, which writes nothing."""
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()


def progress(
    work: Iterable[Any] | None = None,
    *,
    description: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    is_shown: bool = True,
) -> tqdm:
    """Return a bar of tqdm, for a `with` block or a loop, that suits what standard error is.

    In a terminal or a notebook it is drawn as ever. Anywhere else (a pipe, a log file) a line is written every 30
    seconds, and none in the first 30: a bar would write each of its states behind the other.

    Args:
        work: What a loop goes through; None counts by `update`.
        description: The name of the work.
        unit: What is counted, in the singular.
        total: The number of units; by default the length of `work`.
        initial: The number of units that are done already.
        is_shown: Whether to show anything.

    Example:
        >>> with progress(description="rollouts", unit="rollout", total=2) as bar:  # not a terminal: nothing, so soon
        ...     bar.update()
    """
    settings = {"desc": description, "unit": unit, "total": total, "initial": initial, "disable": not is_shown}
    is_notebook = auto.tqdm is not tqdm_asyncio  # tqdm's own choice
    if is_notebook or sys.stderr.isatty():
        return auto.tqdm(work, **settings)
    seldom = {"mininterval": SECONDS_OF_A_LINE, "delay": SECONDS_OF_A_LINE, "miniters": 1}
    return ProgressLines(work, **settings, **seldom, bar_format=LINE, leave=False)
