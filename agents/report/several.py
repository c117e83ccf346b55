"""Several runs on one page: curves with bands over seeds, tables of the seeds, and differences of configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.improvement import SeedComparison
from ..evaluation.prompt_scores import PromptScores
from ..evaluation.resampling import COVERAGE
from ..evaluation.seeds import SeedTable
from .figures import Column, rounded
from .run_data import RunData
from .summary import plain_estimate

OWN_KEYS = ("out",)  # keys of a configuration in which any two runs differ

Points = Mapping[str, Any]  # x, and y with None where there is no value


def together(columns: Sequence[tuple[Sequence[int], Column]]) -> dict[str, list[Any]] | None:
    """Return the mean, the lowest and the highest of a figure of several runs, at the points of the first.

    A run with other points is interpolated linearly between its own; points that some run does not reach are left out.

    Args:
        columns: The x and the values of each run.

    Returns:
        x, y, low and high; None if a run has no value.

    Example:
        >>> together([([0, 10], [1.0, 2.0]), ([0, 20], [3.0, 5.0])])
        {'x': [0, 10], 'y': [2.0, 3.0], 'low': [1.0, 2.0], 'high': [3.0, 4.0]}
    """
    points = [[(x, y) for x, y in zip(xs, ys, strict=True) if y is not None] for xs, ys in columns]
    if not all(points):
        return None
    first, last = max(own[0][0] for own in points), min(own[-1][0] for own in points)
    grid = [x for x, _ in points[0] if first <= x <= last]
    curves = [np.array(own, dtype=np.float64).T for own in points]  # (2, n_own) each
    values = np.stack([np.interp(grid, x, y) for x, y in curves])  # (n_runs, n_points)
    ends = {"y": values.mean(axis=0), "low": values.min(axis=0), "high": values.max(axis=0)}
    return {"x": grid, **{name: [rounded(value) for value in row.tolist()] for name, row in ends.items()}}


def group_of(name: str, numbers: Sequence[int], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a group of runs for the page: its curves, each with a band from the lowest to the highest run.

    Args:
        name: The name of the group.
        numbers: The numbers of its runs on the page.
        runs: These runs, as the page has them.
    """
    figures = {}
    for key in runs[0]["figures"]:
        if all(key in run["figures"] for run in runs):
            figures[key] = together([(run["x"], run["figures"][key]) for run in runs])
    evaluations = {}
    for figure in runs[0]["evaluations"]:
        if all(figure in run["evaluations"] for run in runs):
            own = [run["evaluations"][figure] for run in runs]
            evaluations[figure] = together([(one["x"], one["y"]) for one in own])
    kept = {"figures": figures, "evaluations": evaluations}
    curves = {part: {key: curve for key, curve in own.items() if curve} for part, own in kept.items()}
    return {"name": name, "runs": list(numbers), **curves}


def seed_table(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Return the figures of the seeds of a group, as `SeedTable` estimates them; None if a run lacks its scores."""
    if not all(run.scores for run in runs):
        return None
    after = [run.scores[max(run.scores)] for run in runs]
    before = [run.scores[min(run.scores)] for run in runs] if all(len(run.scores) > 1 for run in runs) else []
    names = [str(run.config.get("seed", run.name)) for run in runs]
    table = SeedTable(after, before, names)
    rows = []
    for name, figure in table.figures.items():
        own = figure._asdict()
        seeds = [plain_estimate(one) for one in own.pop("seeds")]
        spread = {"between": rounded(figure.between), "within": rounded(figure.within)}
        rows.append(
            {"figure": name, **{key: plain_estimate(one) for key, one in own.items()}, "seeds": seeds, **spread}
        )
    return {"names": names, "figures": rows, "n_prompts": len(after[0].prompts), "coverage": COVERAGE.get(len(runs))}


def comparison(names: tuple[str, str], a: Sequence[RunData], b: Sequence[RunData]) -> dict[str, Any] | None:
    """Return whether the first group is better than the second, by `SeedComparison`; None if a run lacks its scores."""
    groups: list[list[PromptScores]] = []
    for runs in (a, b):
        if not all(run.scores for run in runs):
            return None
        groups.append([run.scores[max(run.scores)] for run in runs])
    compared = SeedComparison(groups[0], groups[1], names)
    rows = [
        {
            "figure": name,
            **{key: plain_estimate(one) for key, one in figure._asdict().items()},
            "higher": figure.higher,
        }
        for name, figure in compared.figures.items()
    ]
    n_seeds = min(len(a), len(b))
    sizes = {"n_seeds": n_seeds, "coverage": COVERAGE.get(n_seeds), "n_prompts": len(groups[0][0].prompts)}
    return {"names": list(names), "figures": rows, "is_paired": compared.is_paired, **sizes}


def configuration_differences(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return the keys in which configurations differ, each with its values in each group.

    Args:
        groups: By group, the configuration of each run, by dotted key.

    Example:
        >>> configuration_differences({"a": [{"seed": 0, "n": 1}, {"seed": 1, "n": 1}], "b": [{"seed": 0, "n": 2}]})
        [['n', '1', '2'], ['seed', '0, 1', '0']]
    """
    configs = [config for group in groups.values() for config in group]
    keys = sorted({key for config in configs for key in config} - set(OWN_KEYS))
    rows = []
    for key in keys:
        if len({shown_value(config.get(key)) for config in configs}) > 1:
            values = [dict.fromkeys(shown_value(config.get(key)) for config in group) for group in groups.values()]
            rows.append([key, *(", ".join(one) for one in values)])
    return rows


def shown_value(value: Any) -> str:
    """Return a value of a configuration as one line.

    Example:
        >>> shown_value("gpt2"), shown_value(None), shown_value({"a": True})
        ('gpt2', 'null', '{"a": true}')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
