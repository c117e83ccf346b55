"""The report of one or several runs: from their folders to the file of the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..diagnosis.diagnose import diagnose
from ..errors import CommandError
from ..files import write_text
from ..runs.groups import grouped
from . import episodes, samples
from .episodes import episode_tables
from .figures import FEWEST_POINTS, MAX_POINTS, columns, rounded
from .page import page
from .run_data import RunData, read_run
from .samples import sample_tables
from .several import comparison, configuration_differences, group_of, seed_table, shown_value
from .summary import Change, change_rows, changes, plain_estimate, sentences

REPORT = "report.html"  # in the folder of a run
MARK = "<!doctype html>"  # the first words of every page of ours


def write_report(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None, live: int | None = None
) -> Path:
    """Write the report of runs as one HTML file, whole or not at all.

    Args:
        paths: The folders of runs, or of the runs of several seeds.
        out: The file; by default report.html in the folder, or beside this command for several.
        live: The seconds after which the page loads itself again; None for a page that stays as it is.

    Returns:
        The file.

    Raises:
        CommandError: If a folder is no run, a file in it is damaged, or `out` is another kind of file.

    Example:
        >>> from agents.report.report import write_report
        >>> # write_report(["runs/demo"])
    """
    target = target_of(paths, out)
    title = " · ".join(Path(path).resolve().name for path in paths)
    write_text(target, page(title, {"live": live, **report_data(paths)}))
    return target


def target_of(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None) -> Path:
    """Return the file of a report.

    Raises:
        CommandError: If it is a folder, or a file that is no HTML.
    """
    target = Path(out) if out is not None else Path(paths[0] if len(paths) == 1 else ".") / REPORT
    if target.is_dir() or (target.is_file() and not _begins_as_page(target)):
        raise CommandError(f"Expected a new file, or a page to replace, got {target}, which is neither: name another.")
    return target


def _begins_as_page(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MARK)).lower() == MARK.encode()


def report_data(paths: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Return everything that the page of some runs shows, ready for JSON.

    Raises:
        CommandError: If a folder is no run, or a file in it is damaged.
    """
    folders = grouped(paths)
    groups = {name: [read_run(run.path) for run in runs] for name, runs in folders.items()}
    runs = [run for members in groups.values() for run in members]
    findings = [[asdict(found) for found in diagnose(run.path)] for own in folders.values() for run in own]
    plain = [plain_run(run, len(runs), found) for run, found in zip(runs, findings, strict=True)]
    if len(runs) == 1:
        return {"runs": plain}
    numbers = iter(range(len(runs)))
    of_group = {name: [next(numbers) for _ in members] for name, members in groups.items()}
    for name, own in of_group.items():
        for number in own:
            plain[number]["name"] = name if len(own) == 1 else f"{name}/{plain[number]['name']}"
    (first, ours), *others = groups.items()
    return {
        "runs": plain,
        "groups": [group_of(name, own, [plain[number] for number in own]) for name, own in of_group.items()],
        "tables": [{"name": name, "table": seed_table(members)} for name, members in groups.items()],
        "comparisons": [comparison((first, name), ours, theirs) for name, theirs in others],
        "differences": configuration_differences({name: [run.config for run in own] for name, own in groups.items()}),
    }


def plain_run(run: RunData, n_runs: int, findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page shows of a run, ready for JSON.

    Args:
        run: The run.
        n_runs: The number of runs on the page, which share its room.
        findings: What the doctor found in it, the likeliest first.
    """
    changed = changes(run.scores)
    told = sentences(run, changed)
    return {
        "name": run.name,
        "summary": {"en": [sentence.en for sentence in told], "zh": [sentence.zh for sentence in told]},
        "findings": findings,
        "changes": change_rows(changed),
        **columns(run.rows, max(FEWEST_POINTS, min(MAX_POINTS, 2 * MAX_POINTS // n_runs)))._asdict(),
        "evaluations": evaluation_curves(run, changed),
        "samples": sample_tables(run.samples, samples.BUDGET // n_runs),
        "episodes": episode_tables(run.tokens, episodes.BUDGET // n_runs),
        "credit": run.credit,
        "config": {key: shown_value(value) for key, value in run.config.items()},
    }


def evaluation_curves(run: RunData, changed: Mapping[str, Change]) -> dict[str, dict[str, list[Any]]]:
    """Return the figures of a run's evaluations as curves, the first and the newest with their intervals."""
    curves = {}
    x = [row["num_timesteps"] for row in run.history]
    for name in run.history[-1]["figures"] if run.history else ():
        y = [rounded(row["figures"].get(name)) for row in run.history]
        curve: dict[str, list[Any]] = {"x": x, "y": y, "low": [None] * len(x), "high": [None] * len(x)}
        if name in changed and run.scores:
            ends = {min(run.scores): changed[name].before, max(run.scores): changed[name].after}
            for at, one in ends.items():
                if one is not None and at in x:
                    _, curve["low"][x.index(at)], curve["high"][x.index(at)] = plain_estimate(one) or [None] * 3
        curves[name] = curve
    return curves
