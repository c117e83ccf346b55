"""The figures of a run's iterations as columns of bounded length, with the shares of its time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..evaluation.tables import finite

MAX_POINTS = 1000  # points of a curve: more than a screen has columns for
FEWEST_POINTS = 150  # points that a curve may have however many runs share a page
SPEED = "time/tokens_per_second"
# The shares of a run's time, as the page stacks them. The rest is the writing of texts, and everything else.
UPDATE, REWARD, EVALUATION, REST = "share/update", "share/reward", "share/evaluation", "share/rest"

Row = Mapping[str, Any]
Column = list[float | None]


class Columns(NamedTuple):
    """Figures of a run over its tokens.

    Attributes:
        x: The number of tokens trained on at each point, (n,).
        figures: By log key, the value at each point, (n,), None where there is none.
        rows_per_point: The number of iterations whose mean a point is.
    """

    x: list[int]
    figures: dict[str, Column]
    rows_per_point: int


def rounded(value: float | None, digits: int = 5) -> float | None:
    """Return a number with a few significant digits, which are shorter in JSON; None for NaN and infinity.

    Example:
        >>> rounded(0.123456789), rounded(float("nan"))
        (0.12346, None)
    """
    if finite(value) is None:
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def columns(rows: Sequence[Row], max_points: int = MAX_POINTS) -> Columns:
    """Return the figures of a run as columns; those of evaluations are left out, which have a file of their own.

    Args:
        rows: The rows of metrics.jsonl.
        max_points: The most points; of a longer run, each point is the mean of several iterations.

    Example:
        >>> columns([{"tokens": 8, "a": 1.0}, {"tokens": 16, "a": 3.0}, {"tokens": 24}], max_points=2)
        Columns(x=[16, 24], figures={'a': [2.0, None]}, rows_per_point=2)
    """
    whole = [{**row, **time_shares(row, before)} for row, before in zip(rows, [None, *rows], strict=False)]
    size = max(1, math.ceil(len(whole) / max_points))
    parts = [whole[start : start + size] for start in range(0, len(whole), size)]
    keys = dict.fromkeys(key for row in whole for key, value in row.items() if not isinstance(value, str))
    names = [key for key in keys if key != "tokens" and not key.startswith("eval/")]
    figures = {name: [rounded(mean_of(part, name)) for part in parts] for name in names}
    kept = {name: values for name, values in figures.items() if any(value is not None for value in values)}
    return Columns([part[-1]["tokens"] for part in parts], kept, size)


def mean_of(rows: Sequence[Row], name: str) -> float | None:
    """Return the mean of a figure over the rows that have it; None if none has."""
    values = [row[name] for row in rows if finite(row.get(name)) is not None]
    return sum(values) / len(values) if values else None


def seconds_of(row: Row, before: Row | None) -> float | None:
    """Return the seconds from the end of one rollout to the end of the next; None if its row does not tell."""
    speed = finite(row.get(SPEED))
    written = row["tokens"] - (0 if before is None else before["tokens"])
    return written / speed if speed and written > 0 else None


def time_shares(row: Row, before: Row | None) -> dict[str, float]:
    """Return the shares of an iteration's time, which add up to 1; nothing for a row without times.

    Example:
        >>> row = {"tokens": 100, "time/tokens_per_second": 50.0, "time/reward_share": 0.25, "time/update_share": 0.5}
        >>> time_shares(row, None)
        {'share/update': 0.5, 'share/reward': 0.25, 'share/evaluation': 0.0, 'share/rest': 0.25}
    """
    seconds = seconds_of(row, before)
    if seconds is None or "time/update_share" not in row:
        return {}
    # A row has the evaluation after its update, which is in the time of the next row's rollout.
    evaluation = (finite((before or {}).get("time/evaluation_seconds")) or 0.0) / seconds
    known = [finite(row.get("time/update_share")) or 0.0, finite(row.get("time/reward_share")) or 0.0, evaluation]
    shares = [*known, max(0.0, 1.0 - sum(known))]
    return dict(zip((UPDATE, REWARD, EVALUATION, REST), (share / sum(shares) for share in shares), strict=True))


def total_seconds(rows: Sequence[Row]) -> float:
    """Return the seconds that a run's iterations took, over all times that it was resumed."""
    return sum(seconds_of(row, before) or 0.0 for row, before in zip(rows, [None, *rows], strict=False))
