"""Figures as text, alone and with intervals: cells and tables in Markdown, and numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textenv.metrics.bootstrap import Estimate


def finite(value: float | None) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity: None stands for both."""
    return value if value is not None and math.isfinite(value) else None


def plain(figure: Estimate) -> dict[str, float | None]:
    """Return a figure for JSON, with None for NaN and infinity."""
    return {name: finite(value) for name, value in figure._asdict().items()}


def cell(value: float | None) -> str:
    """Return a number to three significant digits, and a whole one in full; nothing for None, NaN and infinity.

    Example:
        >>> cell(0.12345), cell(24_576), cell(None)
        ('0.123', '24,576', '')
    """
    if finite(value) is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:#.3g}"


def shown(figure: Estimate | None, sign: str = "") -> str:
    """Return a figure with its interval, to three significant digits; `sign="+"` shows the sign of positive ones.

    Example:
        >>> shown(Estimate(0.5, 0.25, 0.75), sign="+")
        '+0.500 [+0.250, +0.750]'
    """
    if figure is None:
        return ""
    digits = f"{sign}#.3g"
    interval = "" if figure.low is None or figure.high is None else f" [{figure.low:{digits}}, {figure.high:{digits}}]"
    return f"{figure.value:{digits}}{interval}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Example:
        >>> print(markdown(["figure", "value"], [["reward", "0.5"]]))
        | figure | value |
        |---|---|
        | reward | 0.5 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)
