"""Curves of a run's figures over its tokens, or of several runs together, drawn as a PNG file."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textenv.checks.extras import check_extra, needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("reward/task", "reward"),
    ("kl/sequence", "KL from the reference, nats"),
    ("episode/length", "length, tokens"),
    ("eval/judge", "judge"),
    ("eval/gap", "reward ahead of the judge, deviations"),
)
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of every PNG file
SPIKE = 2.0  # in heights of the curves: a value farther away from them is marked at the panel's edge
MARKED = 3  # how many of the farthest such values are written beside their marks
LEGEND = 28  # characters per line of a run's name in the legend

Point = tuple[float, float]  # tokens, value


def check_matplotlib() -> None:
    """Raise ImportError, with the cure, if matplotlib is missing; call it before training, not after."""
    check_extra("plot", "matplotlib", "the curves")


def draw_curves(
    path: str | os.PathLike[str],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str = "",
    groups: Mapping[str, str] | None = None,
) -> None:
    """Draw the figures of runs over their tokens, a panel for each of `CURVES`, as a PNG file.

    The file is replaced whole or not at all. A few values far from the others do not flatten a panel: triangles at its
    edge mark them instead.

    Args:
        path: The file.
        runs: The rows of each run, by the run's name. A row has "tokens", and figures by their log keys; figures that
            are missing, None, NaN or infinite are left out.
        title: The title of the picture.
        groups: By run, the name of the group that it belongs to, such as the runs of several seeds: a group has one
            colour and its name stands in the legend. A run that is missing is a group of its own.

    Raises:
        ImportError: Without matplotlib.

    Example:
        >>> rows = [{"tokens": 512, "reward/task": 0.2}, {"tokens": 1024, "reward/task": 0.6}]
        >>> # draw_curves("curves.png", {"my run": rows})
    """
    with needs("plot", "matplotlib", "the curves"):
        from matplotlib.figure import Figure

    # `Figure` without pyplot, which would open a window system and keep the figure alive.
    points = {(name, key): _points(rows, key) for name, rows in runs.items() for key, _ in CURVES}
    drawn = [(key, label) for key, label in CURVES if any(points[name, key] for name in runs)]
    figure = Figure(figsize=(4.2 * max(len(drawn), 1), 3.2), layout="constrained")
    axes = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
    group_of = {name: name if groups is None else groups.get(name, name) for name in runs}
    names = list(dict.fromkeys(group_of.values()))
    colors = [f"C{names.index(group)}" for group in group_of.values()]  # matplotlib's usual colours, in their order
    for axis, (key, label) in zip(axes, drawn, strict=False):
        _draw_panel(axis, label, {name: points[name, key] for name in runs}, colors)
    if not drawn:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no figures", ha="center", va="center")
    if len(names) > 1 and drawn:
        labels = ["\n".join(textwrap.wrap(name, LEGEND)) for name in names]
        lines = [axes[0].get_lines()[list(group_of.values()).index(name)] for name in names]
        figure.legend(lines, labels, loc="outside right upper", fontsize="small")
    if title:
        figure.suptitle(title + "\n", fontweight="bold", linespacing=0.6)  # a gap of 0.6 lines below the title
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(target)


def shown_range(curves: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return the lowest and highest value that a panel shows, without spikes; None if there are no spikes.

    A curve's running median follows a rise at its start, but no spike. The height of the curves is the range of their
    medians plus twice the noise around them (the third quartile of the distances between values and medians).

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
    if len(near) == len(values) or len(set(near)) < 2:  # fewer than 2: constant except for spikes, so there is no range
        return None
    return min(near), max(near)


def _running_median(curve: Sequence[float]) -> Sequence[float]:
    if len(curve) < 3:  # neither of two values is a spike
        return curve
    return [float(np.median(curve[max(0, i - 2) : i + 3])) for i in range(len(curve))]  # windows of five values


def _draw_panel(axis: Axes, label: str, curves: Mapping[str, Sequence[Point]], colors: Sequence[str]) -> None:
    with needs("plot", "matplotlib", "the curves"):
        from matplotlib.ticker import EngFormatter

    for (name, points), color in zip(curves.items(), colors, strict=True):
        marker = "o" if len(points) == 1 else ""  # a line through a single point is invisible
        axis.plot(*zip(*points, strict=True) if points else ((), ()), marker=marker, label=name, color=color)
    axis.set(xlabel="tokens", title=label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    shown = shown_range([[value for _, value in points] for points in curves.values()])
    if shown is not None:
        _mark_spikes(axis, curves, shown)


def _mark_spikes(axis: Axes, curves: Mapping[str, Sequence[Point]], shown: tuple[float, float]) -> None:
    """Limit a panel to a range, and mark each value outside by a triangle at its edge, the farthest with numbers."""
    low, high = shown
    left, right = axis.get_xlim()
    room = 0.15 * (high - low)  # above and below the curves, for the triangles
    bottom, top = low - room, high + room
    spikes = [
        (abs(value - (high if value > high else low)), tokens, value, line.get_color())
        for line, points in zip(axis.get_lines(), curves.values(), strict=True)
        for tokens, value in points
        if not low <= value <= high
    ]
    for n_drawn, (_, tokens, value, color) in enumerate(sorted(spikes, reverse=True)):  # the farthest first
        above = value > high
        edge = top if above else bottom
        axis.plot([tokens], [edge], marker="^" if above else "v", color=color, clip_on=False, linestyle="")
        if n_drawn < MARKED:
            side = 1 if tokens < (left + right) / 2 else -1  # towards the middle, where there is room
            axis.annotate(
                f"{value:.3g}",
                (tokens, edge),
                xytext=(8 * side, -4 if above else 4),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
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
    """Raise FileExistsError if a picture would replace a folder, or a file that is not a PNG."""
    file = Path(path)
    if file.is_dir() or (file.is_file() and not _begins_as_png(file)):
        raise FileExistsError(f"Expected a new file, or a PNG to replace, got {file}, which is neither: name another.")


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    pairs = [(row["tokens"], row.get(key)) for row in rows]
    return [(tokens, value) for tokens, value in pairs if value is not None and math.isfinite(value)]
