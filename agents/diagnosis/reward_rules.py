"""The rules of a reward that teaches nothing: constant, read from a wrong column, without a signal, failing or slow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from textenv.prompts.prompts import read_rows

from .findings import Diagnosis
from .run_files import RunRecord
from .trends import EQUAL_REWARDS, MIN_ROWS

EQUAL = 0.8  # the share of rollouts with equal rewards above which the reward is constant
LEAST_SIGNAL = 0.15  # the share of groups with a signal below which there is hardly any
FAILING = 0.05  # the share of texts without a reward: above it `on_failure: drop` stops a run
SLOW = 0.5  # the share of a run's time above which the reward is slow
SLOW_SECONDS = 1.0  # seconds in the reward below which its share does not matter
ALL = 0.98  # a share that counts as all
N_ROWS = 200  # rows of a prompt file that are read


def reward_findings(record: RunRecord) -> list[Diagnosis]:
    """Return the findings of the rules of this file."""
    return [*flat(record), *no_group_signal(record), *failing(record), *slow(record)]


def flat(record: RunRecord) -> list[Diagnosis]:
    """Name why all texts earn the same: texts that are cut, a column that tells nothing, or the reward itself."""
    spreads, rewards = record.series("episode/reward_std"), record.series("reward/task")
    missing = missing_column(record)
    if missing:
        return [Diagnosis.of("wrong-column", 0.97, missing)]
    equal = spreads <= EQUAL_REWARDS
    begins_equal = len(equal) > 0 and equal[: max(2, len(equal) // 4)].mean() >= EQUAL
    if not (begins_equal and equal.mean() >= EQUAL):
        return []
    seen = f"in {equal.mean():.0%} of {len(equal)} rollouts all texts earned the same, {rewards[-1]:.4g} at last"
    found = []
    if column := blind_column(record):
        found.append(Diagnosis.of("wrong-column", 0.95, f"{seen}; {column}"))
    cut = record.series("episode/end_length")
    if len(cut) and cut.mean() >= ALL and record.setting("env", "args", "stop_ids") != []:
        limit = record.setting("env", "max_new_tokens", default="the task's own limit")
        found.append(
            Diagnosis.of("all-cut", 0.93, f"{seen}; {cut.mean():.0%} were cut off at max_new_tokens ({limit})")
        )
    return [*found, Diagnosis.of("constant-reward", 0.9, seen)]


def columns_read(record: RunRecord) -> list[str]:
    """Return the columns of the prompts' rows that the configuration has its reward read."""
    columns = [record.setting("env", "args", "references_column")]
    columns += _columns_in(record.setting("env", "reward"))
    return [column for column in columns if isinstance(column, str)]


def _columns_in(value: Any) -> list[Any]:
    if not isinstance(value, Mapping):
        return []
    return [entry for key, inner in value.items() for entry in ([inner] if key == "column" else _columns_in(inner))]


def missing_column(record: RunRecord) -> str:
    """Return what shows that the reward asked a row for a column that it does not have; nothing if it did not."""
    asked = [column for column in columns_read(record) if f"KeyError: '{column}'" in record.error]
    asked = asked or (["a column"] if "KeyError" in record.error and "reward" in record.error.lower() else [])
    return f"the run ended with {record.error[:200]}" if asked else ""


def blind_column(record: RunRecord) -> str:
    """Return what shows that a column that the reward reads cannot tell texts apart; nothing if there is none."""
    prompts = record.setting("env", "prompts")
    if not isinstance(prompts, str) or not Path(prompts).is_file():
        return ""
    try:
        rows = read_rows(prompts)[:N_ROWS]
    except ValueError:  # another encoding, or the file has changed: there is nothing to say about it
        return ""
    rows = [row for row in rows if isinstance(row, dict)]
    prompt_column = record.setting("env", "args", "prompt_column", default="prompt")
    for column in columns_read(record):
        values = [str(row.get(column, "")) for row in rows]
        others = sorted({name for row in rows for name in row} - {column, prompt_column})
        if not values or not others:
            continue
        fault = ""
        if not any(value.strip() for value in values):
            fault = "is empty in all rows"
        elif len(set(values)) == 1 and len(rows) > 1:
            fault = f"is {values[0]!r:.40} in all rows"
        elif all(value == str(row.get(prompt_column)) for value, row in zip(values, rows, strict=True)):
            fault = "is the prompt itself"
        elif better := _written_more(record, rows, column, others):
            fault = f"is in none of the sampled texts, and {better!r} is"
        elif all(_is_number(value) for value in values) and (texts := _text_columns(rows, others)):
            fault = f"holds numbers such as {values[0]!r:.20}, and {', '.join(map(repr, texts))} holds text"
        if fault:
            return f"the column {column!r} of {prompts}, which the reward reads, {fault}"
    return ""


def _text_columns(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    return [name for name in names if not all(_is_number(str(row.get(name, ""))) for row in rows)]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _written_more(record: RunRecord, rows: list[dict[str, Any]], column: str, others: list[str]) -> str:
    """Return another column whose values are in the sampled texts of their prompts, while those of `column` are not."""
    texts: dict[str, str] = {}
    for sample in record.samples:
        texts[sample["prompt"]] = texts.get(sample["prompt"], "") + "\n" + sample["text"]
    prompt_column = record.setting("env", "args", "prompt_column", default="prompt")
    known = [(texts[str(row.get(prompt_column))], row) for row in rows if str(row.get(prompt_column)) in texts]

    def hits(name: str) -> int:
        return sum(bool(str(row.get(name, "")).strip()) and str(row[name]) in text for text, row in known)

    best = max(others, key=hits)
    return best if hits(column) == 0 and hits(best) > 0 else ""


def no_group_signal(record: RunRecord) -> list[Diagnosis]:
    """Name groups whose samples earn the same from the start on, while rewards differ between prompts."""
    signal, spreads = record.series("groups/signal"), record.series("episode/reward_std")
    if len(signal) < MIN_ROWS or (len(spreads) and spreads.max() <= EQUAL_REWARDS):
        return []
    begin = signal[: max(2, len(signal) // 2)]
    if np.median(begin) >= LEAST_SIGNAL or np.median(signal) >= LEAST_SIGNAL:
        return []
    seen = f"in the median rollout {np.median(signal):.0%} of the groups have scores that are not all equal"
    return [Diagnosis.of("no-group-signal", 0.88, f"{seen}, while the reward deviates by {spreads.mean():.3g}")]


def failing(record: RunRecord) -> list[Diagnosis]:
    """Name a reward that fails for more than a few texts."""
    failed = record.series("episode/dropped").sum() + record.series("episode/failed").sum()
    # Texts with a penalty are among the counted ones, dropped ones are not.
    n = record.series("episode/count").sum() + record.series("episode/dropped").sum()
    if n and failed / n > FAILING:
        return [Diagnosis.of("reward-fails", 0.87, f"{failed:.0f} of {n:.0f} texts have no reward of their own")]
    if "RewardError" in record.error and not missing_column(record):
        return [Diagnosis.of("reward-fails", 0.92, f"the run ended with {record.error[:200]}")]
    return []


def slow(record: RunRecord) -> list[Diagnosis]:
    """Name a reward that takes most of the time of a run."""
    rows = [row for row in record.rows if row.get("time/reward_share") is not None]
    shares = record.series("time/reward_share")
    if len(shares) < 2 or np.median(shares) <= SLOW:
        return []
    seconds = before = 0.0
    for row in rows:
        n_tokens, before = row["tokens"] - before, row["tokens"]
        seconds += row["time/reward_share"] * n_tokens / max(row.get("time/tokens_per_second") or 0.0, 1e-9)
    if seconds < SLOW_SECONDS:
        return []
    seen = f"the reward takes {np.median(shares):.0%} of the time of the median rollout, about {seconds:.0f} s in all"
    return [Diagnosis.of("reward-slow", 0.55, seen)]
