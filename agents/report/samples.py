"""The samples of a run over time: the same prompts at every table, as many tables as a page may hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import rounded

BUDGET = 400_000  # characters of all texts of a run


def spread(n: int, most: int) -> list[int]:
    """Return at most `most` (2 or more) of the numbers below `n`, evenly spaced, with the first and the last.

    Example:
        >>> spread(10, 4), spread(3, 9)
        ([0, 3, 6, 9], [0, 1, 2])
    """
    if n <= most:
        return list(range(n))
    return [round(i * (n - 1) / (most - 1)) for i in range(most)]


def sample_tables(rows: Sequence[Mapping[str, Any]], budget: int = BUDGET) -> dict[str, Any]:
    """Return the samples of a run by prompt and table.

    Args:
        rows: The rows of samples.jsonl.
        budget: The most characters. First tables are left out, between the first and the last, and then prompts.

    Returns:
        `prompts`; `tables`, each with `tokens` and, for each prompt, a text or None; and the numbers of tables and
        prompts that there are in all, `n_tables` and `n_prompts`.
    """
    tables: dict[int, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in rows:
        table = tables.setdefault(row["tokens"], {})
        repeats = Counter(prompt for prompt, _ in table)  # a table may have the same prompt several times
        table[row["prompt"], repeats[row["prompt"]]] = _cell(row)
    prompts = list(dict.fromkeys(key for table in tables.values() for key in table))
    size = {
        key: max((len(table[key]["text"]) for table in tables.values() if key in table), default=0) for key in prompts
    }
    kept: list[tuple[str, int]] = []
    total = 0
    for key in prompts:  # so many prompts that two tables of them fit
        total += size[key] + len(key[0])
        if kept and 2 * total > budget:
            break
        kept.append(key)
    each = max(1, sum(size[key] for key in kept))
    chosen = [list(tables)[i] for i in spread(len(tables), max(2, budget // each))]
    return {
        "prompts": [prompt for prompt, _ in kept],
        "tables": [{"tokens": at, "cells": [tables[at].get(key) for key in kept]} for at in chosen],
        "n_tables": len(tables),
        "n_prompts": len(prompts),
    }


def _cell(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": row["text"], "end": row["end_reason"], "reward": rounded(row["reward"])}
