"""Pictures of figures over training: one run's, or several in the same picture."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textenv.extras import check_extra, needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("reward/task", "reward"),
    ("kl/sequence", "KL from the reference, nats"),
    ("episode/length", "length, tokens"),
)
PNG = b"\x89PNG\r\n\x1a\n"  # what each file of that kind begins with
SPIKE = 2.0  # heights of the curves; a value that is farther from them is marked at the panel's edge
MARKED = 3  # values that are written beside their marks: the farthest ones
LEGEND = 28  # characters of a run's name in a line of the legend

Point = tuple[float, float]


def check_matplotlib() -> None:
    """Raise ImportError, with the cure, where matplotlib is missing: before training, not after."""
    check_extra("plot", "matplotlib", "the curves")


def draw_curves(path: str | os.PathLike[str], runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "") -> None:
    """Draw the curves of runs over their tokens as a PNG, which appears whole or stays as it was.

    A few values that lie far from the others do not flatten a panel: a triangle at its edge says how far they go.

    Args:
        path: The picture's file.
        runs: Rows of figures by the run's name, each with "tokens"; what is missing, None, NaN or infinite is left out.
        title: What stands above it.
    """
    with needs("plot", "matplotlib", "the curves"):
        from matplotlib.figure import Figure

    points = {(name, key): _points(rows, key) for name, rows in runs.items() for key, _ in CURVES}
    drawn = [(key, label) for key, label in CURVES if any(points[name, key] for name in runs)]
    figure = Figure(figsize=(4.2 * max(len(drawn), 1), 3.2), layout="constrained")
    axes = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
    for axis, (key, label) in zip(axes, drawn, strict=False):
        _draw_panel(axis, label, {name: points[name, key] for name in runs})
    if not drawn:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no figures", ha="center", va="center")
    if len(runs) > 1 and drawn:
        labels = ["\n".join(textwrap.wrap(name, LEGEND)) for name in runs]
        figure.legend(axes[0].get_lines()[: len(runs)], labels, loc="outside right upper", fontsize="small")
    if title:
        figure.suptitle(title + "\n", fontweight="bold", linespacing=0.6)  # half a line between it and the panels'
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(target)


def shown_range(curves: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return the range of a panel that leaves out spikes; None where there are none.

    Where a curve goes for longer is its running median, which a rise at the start is part of, and a spike is not; how
    far most values are from that is noise, which belongs to the height as well.

    Example:
        >>> shown_range([[0.0, 1.0, 2.0, 1.5, 2.5]]) is None
        True
        >>> shown_range([[0.0, 1.0, 2.0, 500.0, 1.5, 2.5]])
        (0.0, 2.5)
    """
    values = [value for curve in curves for value in curve]
    medians = [median for curve in curves for median in _running_median(curve)]
    low, high = min(medians), max(medians)
    noise = np.quantile(np.abs(np.subtract(values, medians)), 0.75)
    reach = SPIKE * (high - low + 2 * noise)
    near = [value for value in values if low - reach <= value <= high + reach]
    if len(near) == len(values) or len(set(near)) < 2:  # the second of a curve that is constant but for its spikes
        return None
    return min(near), max(near)


def _running_median(curve: Sequence[float]) -> Sequence[float]:
    if len(curve) < 3:  # nothing can be told from nothing
        return curve
    return [float(np.median(curve[max(0, i - 2) : i + 3])) for i in range(len(curve))]


def _draw_panel(axis: Axes, label: str, curves: Mapping[str, Sequence[Point]]) -> None:
    with needs("plot", "matplotlib", "the curves"):
        from matplotlib.ticker import EngFormatter

    for name, points in curves.items():
        marker = "o" if len(points) == 1 else ""  # one point is no line
        axis.plot(*zip(*points, strict=True) if points else ((), ()), marker=marker, label=name)
    axis.set(xlabel="tokens", title=label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    shown = shown_range([[value for _, value in points] for points in curves.values()])
    if shown is not None:
        _mark_spikes(axis, curves, shown)


def _mark_spikes(axis: Axes, curves: Mapping[str, Sequence[Point]], shown: tuple[float, float]) -> None:
    """Cut the panel to a range, with a triangle at its edge for each value beyond, and the farthest of them written."""
    low, high = shown
    left, right = axis.get_xlim()
    room = 0.15 * (high - low)  # for the marks, and as much again for what is written
    bottom, top = low - room, high + room
    cut = [
        (abs(value - (high if value > high else low)), tokens, value, line.get_color())
        for line, points in zip(axis.get_lines(), curves.values(), strict=True)
        for tokens, value in points
        if not low <= value <= high
    ]
    for place, (_, tokens, value, color) in enumerate(sorted(cut, reverse=True)):
        above = value > high
        edge = top if above else bottom
        axis.plot([tokens], [edge], marker="^" if above else "v", color=color, clip_on=False, linestyle="")
        if place < MARKED:
            beside = 1 if tokens < (left + right) / 2 else -1  # where there is room
            axis.annotate(
                f"{value:.3g}",
                (tokens, edge),
                xytext=(8 * beside, -4 if above else 4),
                textcoords="offset points",
                ha="left" if beside > 0 else "right",
                va="top" if above else "bottom",
                fontsize="small",
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
    axis.set_ylim(bottom, top)


def _begins_as_png(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(PNG)) == PNG


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError where another file than a PNG stands, which a picture would replace."""
    file = Path(path)
    if file.is_dir() or (file.is_file() and not _begins_as_png(file)):
        raise FileExistsError(f"Expected a new file, or a PNG to replace, got {file}, which is neither: name another.")


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    found = [(row["tokens"], row.get(key)) for row in rows]
    return [(tokens, value) for tokens, value in found if value is not None and math.isfinite(value)]
