"""Pictures of figures over training: one run's, or several in the same picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textenv.extras import check_extra, needs

CURVES = (
    ("reward/task", "reward"),
    ("kl/sequence", "KL from the reference, nats"),
    ("episode/length", "length, tokens"),
)


def check_matplotlib() -> None:
    """Raise ImportError, with the cure, where matplotlib is missing: before training, not after."""
    check_extra("plot", "matplotlib", "the curves")


def draw_curves(path: str | os.PathLike[str], runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "") -> None:
    """Draw the curves of runs over their tokens as a PNG, which appears whole or stays as it was.

    Args:
        path: The picture's file.
        runs: Rows of figures by the run's name, each with "tokens"; what is missing, None or NaN leaves a gap.
        title: What stands above it.
    """
    with needs("plot", "matplotlib", "the curves"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

    points = {(name, key): _points(rows, key) for name, rows in runs.items() for key, _ in CURVES}
    drawn = [(key, label) for key, label in CURVES if any(points[name, key] for name in runs)]
    figure = Figure(figsize=(4.2 * max(len(drawn), 1), 3), layout="constrained")
    axes = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
    for axis, (key, label) in zip(axes, drawn, strict=False):
        for name in runs:
            axis.plot(*zip(*points[name, key], strict=True) if points[name, key] else ((), ()), label=name)
        axis.set(xlabel="tokens", title=label)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    if len(runs) > 1 and drawn:
        axes[0].legend(fontsize="small")
    figure.suptitle(title)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(target)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [(row["tokens"], row.get(key)) for row in rows]
    return [(tokens, value) for tokens, value in found if value is not None and not math.isnan(value)]
