"""The command `textenv compare`: the curves of several runs in one picture, and a table. It does not load torch."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Exit
from ..evaluation.curves import check_matplotlib, check_picture, draw_curves
from ..runs.folder import RunFolder, read_rows

# The figures of the table, by their keys in metrics.jsonl.
COLUMNS = ("reward/task", "kl/sequence", "episode/length", "eval/reward")


def compare(paths: Sequence[str], out: str) -> int:
    """Draw the curves of runs, and print the last value of each figure and the first of the reward.

    Args:
        paths: The folders of the runs.
        out: The file of the picture.

    Returns:
        The exit code.

    Raises:
        CommandError: If a folder is not that of a run.
        MissingExtraError: If matplotlib is not installed.
    """
    check_matplotlib()
    check_picture(out)
    runs = {}
    for path in paths:
        run = RunFolder.open(path)
        name = run.path.resolve().name
        # Two runs may have folders of the same name: the later one is shown by its whole path.
        runs[name if name not in runs else str(path)] = read_rows(run.metrics)
    draw_curves(out, runs)
    print(f"| run | tokens | reward at first | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 3)}")
    for name, rows in runs.items():
        values = [[row[key] for row in rows if row.get(key) is not None] for key in COLUMNS]
        cells = [
            _shown(values[0][:1]),
            *(_shown(column[-1:]) for column in values),
        ]  # first reward, last values
        print(f"| {name} | {rows[-1]['tokens'] if rows else 0:,} | {' | '.join(cells)} |")
    print(f"curves: {out}")
    return Exit.DONE


def _shown(values: Sequence[float]) -> str:
    return f"{values[0]:#.3g}" if values else ""
