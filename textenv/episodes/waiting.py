"""The announcement that a reward waits for people, whose time is no sign of a process that hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_n_waiting = 0


@contextmanager
def waiting_for_people() -> Iterator[None]:
    """Return a context in which this process waits for people, as long as they take.

    Several processes that train together take one that makes no progress for `TEXTENV_TIMEOUT` seconds for one that
    hangs. In this context that clock does not run. `HumanReward` uses it; a reward of your own that asks people does
    the same.

    Example:
        >>> from textenv.rewards import waiting_for_people
        >>> def reward(prompt, preds, done):
        ...     with waiting_for_people():
        ...         return float(input(f"{preds.text}: how good is it? "))
    """
    global _n_waiting
    with _lock:
        _n_waiting += 1
    try:
        yield
    finally:
        with _lock:
            _n_waiting -= 1


def waits_for_people() -> bool:
    """Return whether this process waits for people now.

    Example:
        >>> with waiting_for_people():
        ...     waits_for_people()
        True
    """
    return _n_waiting > 0
