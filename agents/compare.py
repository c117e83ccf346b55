"""The command `textenv compare`: several runs in one picture and a table; without torch."""

from __future__ import annotations

from collections.abc import Sequence

from .curves import check_matplotlib, check_picture, draw_curves
from .refusal import Exit
from .run_folder import RunFolder, read_rows

COLUMNS = ("reward/task", "kl/sequence", "episode/length", "eval/reward")


def compare(paths: Sequence[str], out: str) -> int:
    """Draw the curves of runs and print their last figures, the reward's first as well."""
    check_matplotlib()
    check_picture(out)
    runs = {}
    for path in paths:
        run = RunFolder.open(path)
        name = run.path.resolve().name
        runs[name if name not in runs else str(path)] = read_rows(run.metrics)
    draw_curves(out, runs)
    print(f"| run | tokens | reward at first | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 3)}")
    for name, rows in runs.items():
        values = [[row[key] for row in rows if row.get(key) is not None] for key in COLUMNS]
        cells = [_shown(values[0][:1]), *(_shown(column[-1:]) for column in values)]
        print(f"| {name} | {rows[-1]['tokens'] if rows else 0:,} | {' | '.join(cells)} |")
    print(f"curves: {out}")
    return Exit.DONE


def _shown(values: Sequence[float]) -> str:
    return f"{values[0]:#.3g}" if values else ""
