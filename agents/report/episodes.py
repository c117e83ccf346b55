"""The episodes of the token view: as many tables of a run's tokens.jsonl as a page may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import rounded
from .samples import spread

BUDGET = 6_000  # tokens, with about 150 bytes of numbers each
DIGITS = 4  # significant ones: a page shows three


def episode_tables(rows: Sequence[Mapping[str, Any]], budget: int = BUDGET) -> dict[str, Any]:
    """Return trained episodes by table.

    Args:
        rows: The rows of tokens.jsonl.
        budget: The most tokens. Tables between the first and the last are left out first, and then episodes.

    Returns:
        `tables`, each with `tokens` and its `episodes`, and their number in all, `n_tables`.
    """
    tables: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["tokens"], []).append(row)
    sizes = [sum(len(row["pieces"]) for row in table) for table in tables.values()]
    chosen = [list(tables)[i] for i in spread(len(tables), max(2, budget // max([1, *sizes])))]
    kept = []
    for at in chosen:
        episodes: list[dict[str, Any]] = []
        left = budget // len(chosen)
        for row in tables[at]:
            left -= len(row["pieces"])
            if left >= 0 or not episodes:
                episodes.append(_short(row))
        kept.append({"tokens": at, "episodes": episodes})
    return {"tables": kept, "n_tables": len(tables)}


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with shorter numbers, and without those that no token has."""
    short: dict[str, Any] = {"prompt": row["prompt"], "pieces": row["pieces"], "alternatives": row["alternatives"]}
    for name, values in row.items():
        if isinstance(values, list) and name not in short and any(value is not None for value in values):
            short[name] = [rounded(value, DIGITS) if isinstance(value, float) else value for value in values]
    return short
