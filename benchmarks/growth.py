"""Claim 8: how the cost of a token grows with lanes, generated length and vocabulary, drawn as `growth.png`.

    python benchmarks/growth.py [--quick]

The model is small (2 layers, width 64), so that costs other than arithmetic show. The update reads minibatches of 1,024
tokens. One row has a target: from 16 to 512 generated tokens, behind a prompt of one token and at equal tokens per
minibatch, the update of a token may grow by no more than attention's share, counted in multiplications; see `bound`.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from stable_baselines3 import PPO
from work import Row, Settings, Work, pairs, rollout, run_script, timed

from textenv.checks.extras import check_extra, needs

SHAPE = {"n_layer": 2, "width": 64, "n_head": 2, "vocab_size": 1000}
PANELS: dict[str, dict[str, Any]] = {
    "lanes": {"key": "n_lanes", "at": (1, 4, 16, 64, 256), "new_tokens": 32},
    "generated tokens": {"key": "new_tokens", "at": (16, 32, 64, 128, 256, 512), "n_lanes": 64},
    "vocabulary": {"key": "vocab_size", "at": (1000, 5000, 20_000, 50_000, 150_000), "n_lanes": 16, "new_tokens": 32},
}
BATCH = 1024  # tokens of a minibatch, or the whole rollout if it has fewer
SHORT, LONG = 16, 512  # generated tokens of the row with a target
TOKENS = 8192  # tokens of its rollouts; a minibatch has a quarter of them: four of the longer sequences
RUNS = 3  # measured runs of each point, after one warm-up


class Point(NamedTuple):
    """A point of a panel: its place on the axis, and the microseconds per token."""

    x: int
    rollout: float
    update: float


def measure(settings: Settings) -> list[Row]:
    """Measure all points, draw them, and compare short and long."""
    check_extra("plot", "matplotlib", "the picture")  # before the minutes of measuring
    panels = {name: [point(settings, x, dict(panel)) for x in panel["at"]] for name, panel in PANELS.items()}
    path = Path(__file__).with_name("growth.png" if settings.device == "cpu" else f"growth-{settings.device}.png")
    if settings.smoke:
        path = Path(tempfile.mkdtemp()) / path.name
    draw(panels, path)
    return [*(panel_row(name, points) for name, points in panels.items()), length_row(settings)]


def agent(work: Work, batch_size: int = BATCH) -> PPO:
    """Return PPO with one epoch and weights that hardly move."""
    batch_size = min(batch_size, work.n_lanes * work.new_tokens)
    return work.agent(n_epochs=1, batch_size=batch_size, learning_rate=1e-7)


def point(settings: Settings, x: int, panel: dict[str, Any]) -> Point:
    """Return the medians of a few runs after a warm-up."""
    key = panel.pop("key")
    panel.pop("at")
    work = settings.work(**{**SHAPE, **panel, key: x})
    model = agent(work)
    costs = []
    for _ in range(1 + min(RUNS, settings.n_pairs)):
        seconds, n_tokens, _ = timed(lambda: rollout(model), settings.device)
        costs.append((1e6 * seconds / n_tokens, 1e6 * timed(lambda: update(model), settings.device)[0] / n_tokens))
    return Point(x, *map(statistics.median, zip(*costs[1:], strict=True)))


def update(model: PPO) -> int:
    """Update on the rollout that the model holds, and return its number of tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few sequences a minibatch
        model.train()
    return model.n_steps * model.n_envs


def panel_row(name: str, points: list[Point]) -> Row:
    """Return the row with both ends of a panel."""
    first, last = points[0], points[-1]
    rollouts = f"rollout {first.rollout:,.1f} to {last.rollout:,.1f} µs/token"
    updates = f"update {first.update:,.1f} to {last.update:,.1f} µs/token"
    claim = f"growth, {name} {first.x:,} to {last.x:,}"
    return Row(claim, rollouts, updates, None, "-", "drawn in growth.png", None)


def draw(panels: dict[str, list[Point]], path: Path) -> None:
    """Draw a panel for each axis, with a line for the rollout and one for the update."""
    with needs("plot", "matplotlib", "the picture"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True)
    grid[0].set_ylabel("µs a token")
    for axes, (name, points) in zip(grid, panels.items(), strict=True):
        for side, marker in (("rollout", "o"), ("update", "s")):
            axes.loglog([p.x for p in points], [getattr(p, side) for p in points], marker=marker, label=side)
        axes.set_xlabel(name)
        axes.set_xticks([p.x for p in points], [f"{p.x:,}" for p in points])
        axes.set_xticks([], minor=True)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def length_row(settings: Settings) -> Row:
    """Compare updates on short and long completions; longer prompts would make the short ones more expensive."""
    shapes = [{**SHAPE, "prompt_tokens": 1, "new_tokens": n, "n_lanes": TOKENS // n} for n in (SHORT, LONG)]
    works = [settings.work(**shape) for shape in shapes]
    models = [agent(work, TOKENS // 4) for work in works]
    for model in models:
        rollout(model)
    result = pairs(lambda: update(models[0]), lambda: update(models[1]), settings.n_pairs, settings.device)
    most = bound(*works)
    return Row(
        f"update of a token, {works[1].new_tokens} generated tokens against {works[0].new_tokens}",
        f"{1e6 / result.b:,.1f} µs/token",
        f"{1e6 / result.a:,.1f} µs/token",
        result.ratio,
        result.spread,
        f"<= {most:.2f}x (attention's share, by hand)",
        result.ratio <= most,
    )


def bound(short: Work, long: Work) -> float:
    """Return the growth of a generated token's multiplications; a backward doubles each kind, so forwards suffice."""
    return multiplications(long) / multiplications(short)


def multiplications(work: Work) -> float:
    """Return the multiplications of a forward per generated token: all positions in trunk and attention."""
    n_positions = work.prompt_tokens + work.new_tokens
    trunk = 12 * work.width**2  # per layer: 4 H^2 in attention's projections, 8 H^2 in the feed-forward part
    attention = 2 * work.width * n_positions / 2  # per layer: scores and weighted sum, over half of the positions
    in_trunk = work.n_layer * (trunk + attention) * n_positions / work.new_tokens
    return in_trunk + work.width * work.vocab_size


if __name__ == "__main__":
    run_script(__doc__, measure)
