"""The command `textenv compare`: runs, or folders of seeds, in one picture and in tables. It does not load torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Exit
from ..evaluation.curves import check_matplotlib, check_picture, draw_curves
from ..evaluation.improvement import SeedComparison
from ..evaluation.prompt_scores import SCORES_FILE, PromptScores, read_scores
from ..runs.folder import SEED, RunFolder, read_rows

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
    groups: dict[str, list[RunFolder]] = {}
    for path in paths:
        name = Path(path).resolve().name
        # Two folders may have the same name: the later one is shown by its whole path.
        groups[name if name not in groups else str(path)] = _runs(Path(path))
    runs = {
        (group if len(members) == 1 else f"{group}/{run.path.name}"): (group, run)
        for group, members in groups.items()
        for run in members
    }
    rows_of = {name: read_rows(run.metrics) for name, (_, run) in runs.items()}
    draw_curves(out, rows_of, groups={name: group for name, (group, _) in runs.items()})
    print(f"| run | tokens | reward at first | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 3)}")
    for name, rows in rows_of.items():
        print(_line(name, rows))
    (first, ours), *others = groups.items()
    for name, theirs in others:
        _print_comparison({first: ours, name: theirs})
    print(f"curves: {out}")
    return Exit.DONE


def _runs(path: Path) -> list[RunFolder]:
    """Return the run in a folder, or the runs of its seeds, in the order of their numbers."""
    if not (path / "run.json").is_file():
        seeds = [folder for folder in path.glob(f"{SEED}*") if folder.name.removeprefix(SEED).isdecimal()]
        seeds.sort(key=lambda folder: int(folder.name.removeprefix(SEED)))
        if runs := [RunFolder.open(folder) for folder in seeds if (folder / "run.json").is_file()]:
            return runs
    return [RunFolder.open(path)]


def _line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a run's line of the table: its tokens, the first reward, and the last values."""
    values = [[row[key] for row in rows if row.get(key) is not None] for key in COLUMNS]
    cells = [_shown(values[0][:1]), *(_shown(column[-1:]) for column in values)]
    return f"| {name} | {rows[-1]['tokens'] if rows else 0:,} | {' | '.join(cells)} |"


def _shown(values: Sequence[float]) -> str:
    return f"{values[0]:#.3g}" if values else ""


def _print_comparison(groups: Mapping[str, list[RunFolder]]) -> None:
    """Print whether the first of two groups of runs is better than the second, by their newest evaluations."""
    newest: list[list[PromptScores]] = []
    for members in groups.values():
        newest.append([])
        for run in members:
            file = run.path / SCORES_FILE
            scores = read_scores(file) if file.is_file() else {}
            if not scores:
                print(f"\nnot compared: {run.path} has no {SCORES_FILE}, which an evaluation of this version writes")
                return
            newest[-1].append(scores[max(scores)])
    first, second = groups
    print(f"\n{SeedComparison(newest[0], newest[1], (first, second)).to_markdown()}\n")
    unfinished = [str(run.path) for members in groups.values() for run in members if not run.is_finished()]
    if unfinished:
        print(f"not finished, compared as they are: {', '.join(unfinished)}")
