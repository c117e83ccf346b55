"""The command `textenv compare`: runs, or folders of seeds, in one picture and in tables. It does not load torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Exit
from ..evaluation.curves import check_matplotlib, check_picture, draw_curves
from ..evaluation.improvement import SeedComparison
from ..evaluation.prompt_scores import SCORES_FILE, PromptScores, scores_in
from ..evaluation.tables import cell, markdown
from ..runs.folder import RunFolder, read_rows
from ..runs.groups import grouped

# The figures of the table, by their keys in metrics.jsonl.
COLUMNS = ("reward/task", "kl/sequence", "episode/length", "eval/reward")


def compare(paths: Sequence[str], out: str) -> int:
    """Draw the curves of runs, print the last value of each figure, and compare the first folder with each other one.

    Args:
        paths: The folders of runs, or of the runs of several seeds.
        out: The file of the picture.

    Returns:
        The exit code.

    Raises:
        CommandError: If a folder is neither.
        MissingExtraError: If matplotlib is not installed.
    """
    check_matplotlib()
    check_picture(out)
    groups = grouped(paths)
    runs = {
        (group if len(members) == 1 else f"{group}/{run.path.name}"): (group, run)
        for group, members in groups.items()
        for run in members
    }
    # All files are read before the picture is written, so that a damaged one leaves no picture.
    rows_of = {name: read_rows(run.metrics) for name, (_, run) in runs.items()}
    newest = {run.path: scores[max(scores)] for _, run in runs.values() if (scores := scores_in(run.path))}
    draw_curves(out, rows_of, groups={name: group for name, (group, _) in runs.items()})
    print(markdown(["run", "tokens", "first reward", *COLUMNS], [_cells(name, rows) for name, rows in rows_of.items()]))
    (first, ours), *others = groups.items()
    for name, theirs in others:
        _print_comparison({first: ours, name: theirs}, newest)
    print(f"curves: {out}")
    return Exit.DONE


def _cells(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a run's line of the table: its tokens, the first reward, and the last values."""
    values = [[None, *(row[key] for row in rows if row.get(key) is not None)] for key in COLUMNS]
    first = next((value for value in values[0] if value is not None), None)
    return [name, cell(rows[-1]["tokens"] if rows else 0), *map(cell, (first, *(column[-1] for column in values)))]


def _print_comparison(groups: Mapping[str, list[RunFolder]], newest: Mapping[Path, PromptScores]) -> None:
    """Print whether the first of two groups of runs is better than the second, by their newest evaluations."""
    runs = [run for members in groups.values() for run in members]
    if missing := [run.path for run in runs if run.path not in newest]:
        print(f"\nnot compared: {missing[0]} has no {SCORES_FILE}, which an evaluation of this version writes")
        return
    first, second = groups
    a, b = ([newest[run.path] for run in members] for members in groups.values())
    print(f"\n{SeedComparison(a, b, (first, second)).to_markdown()}\n")
    if unfinished := [str(run.path) for run in runs if not run.is_finished()]:
        print(f"not finished, compared as they are: {', '.join(unfinished)}")
