"""The estimate of a run's remaining time, from the recent iterations and the evaluations that are still to come."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

RECENT = 10  # iterations: as many as usually lie between two checkpoints, so that one of them is among them
ELAPSED = "time/time_elapsed"  # the seconds since `learn` began, as SB3 `on_policy_algorithm.dump_logs` logs them


class Timing(NamedTuple):
    """The seconds of an iteration, its rollout, update and evaluation, and the tokens of its rollout."""

    seconds: float
    tokens: int


class Remaining:
    """The remaining time of a run.

    It is the sum of the time for the tokens that are left, at the speed of the last iterations, and of the time for the
    evaluations that are left. Those are counted apart, so that the estimate does not jump when one is due.

    Args:
        total: The number of tokens of the whole run.
        every: The number of tokens between two evaluations.

    Example:
        >>> remaining = Remaining(total=200, every=100)
        >>> remaining.begin()
        >>> remaining.seconds({"tokens": 0, "eval/reward": 0.5}) is None
        True
        >>> remaining.seconds({"tokens": 50}) >= 0
        True
    """

    def __init__(self, total: int, every: int) -> None:
        self.total, self.every = total, every
        self.plain: deque[Timing] = deque(maxlen=RECENT)
        self.evaluated: deque[Timing] = deque(maxlen=RECENT)
        self.evaluated_at = self.at = 0
        self.clock: float | None = None

    def begin(self, tokens: int = 0, rows: Sequence[dict[str, Any]] = ()) -> None:
        """Start the clock.

        Args:
            tokens: The number of tokens so far.
            rows: The rows of a resumed run, whose times are those of its first iterations.
        """
        for row, after in pairwise(rows):
            # A row's time is that of its rollout's end: its update and its evaluation come before the next row's.
            passed = after.get(ELAPSED, 0) - row.get(ELAPSED, math.inf)
            if passed >= 0:  # it begins anew with each session
                self._note(row, Timing(passed, after["tokens"] - row["tokens"]))
        self.evaluated_at = max((row["tokens"] for row in rows if is_evaluated(row)), default=0)
        self.clock, self.at = time.monotonic(), tokens

    def seconds(self, row: dict[str, Any]) -> float | None:
        """Return the remaining seconds after an iteration; None while nothing has been timed.

        Args:
            row: The iteration's row of metrics.jsonl.
        """
        now, tokens = time.monotonic(), row["tokens"]
        if self.clock is not None:
            self._note(row, Timing(now - self.clock, tokens - self.at))
        self.clock, self.at = now, tokens
        if is_evaluated(row):
            self.evaluated_at = tokens
        trained = [passed for passed in self.plain or self.evaluated if passed.tokens]
        if not trained:
            return None
        speed = sum(passed.seconds for passed in trained) / sum(passed.tokens for passed in trained)
        # Where each iteration evaluates, its evaluation is in the speed already.
        extra = [max(passed.seconds - speed * passed.tokens, 0.0) for passed in self.evaluated if self.plain]
        evaluation = sum(extra) / len(extra) if extra else 0.0
        # `Evaluate` evaluates at the first start of a rollout after `every` tokens, and at the end.
        between = math.ceil(self.every / trained[-1].tokens) * trained[-1].tokens
        n_left = math.ceil(max(self.total - self.evaluated_at, 0) / between)
        return speed * max(self.total - tokens, 0) + evaluation * n_left

    def _note(self, row: dict[str, Any], passed: Timing) -> None:
        (self.evaluated if is_evaluated(row) else self.plain).append(passed)


def is_evaluated(row: dict[str, Any]) -> bool:
    """Return whether a row of metrics.jsonl has the figures of an evaluation."""
    return any(name.startswith("eval/") for name in row)


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds.

    Example:
        >>> clock(3723.4)
        '1:02:03'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
