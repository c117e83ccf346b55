"""Warnings that a process other than rank 0 gives alone: rank 0, which speaks for all, says them, once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .collectives import gather
from .world import joined


@contextmanager
def warnings_noted(show: Callable[..., Any] | None = None) -> Iterator[None]:
    """Within, note each warning that this process shows, until the processes meet in `warnings_of_others`.

    `warnings.catch_warnings` restores the display and the filters at the end, also after an error.

    Args:
        show: A function that shows a warning, with the arguments of `warnings.showwarning`; by default that one.
    """
    with warnings.catch_warnings():
        shown = show or warnings.showwarning

        def note(message: Warning | str, *rest: Any, **more: Any) -> None:
            here = joined()
            if here is not None:
                here.warned.append(str(message))
            shown(message, *rest, **more)

        warnings.showwarning = note
        yield


def warnings_of_others() -> list[str]:
    """Return the warnings of other processes since the last call that rank 0 has not given, each with its rank.

    All processes must call it, and all get the same list. Texts that differ in their numbers alone are one warning,
    since most count what a process has seen.

    Example:
        >>> warnings_of_others()  # one process
        []
    """
    here = joined()
    if here is None:
        return []
    own, here.warned = here.warned, []
    of_main, *of_others = gather("warnings", own)
    here.known_warnings.update(map(_kind, of_main))
    found = []
    for rank, texts in enumerate(of_others, start=1):
        for text in texts:
            if _kind(text) not in here.known_warnings:
                here.known_warnings.add(_kind(text))
                found.append(f"rank {rank}: {text}")
    return found


def _kind(text: str) -> str:
    return re.sub(r"\d+", "0", text)
