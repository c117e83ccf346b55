"""The files that a run left, read as far as they can be: of a finished, a broken, or a run that is going on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from textenv.checks.json_files import parse_json, read_json

from ..configuration.plain_yaml import Loader, read_yaml
from ..errors import CommandError

ROW = {"tokens": int}
SAMPLE = {"tokens": int, "prompt": str, "text": str}
HISTORY = [{"num_timesteps": int, "figures": {str: (float, None)}}]
TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class RunRecord:
    """What is left of a run.

    Attributes:
        path: Its folder.
        config: The content of config.yml, nested; empty if that is lost.
        rows: The rows of metrics.jsonl, one for each iteration.
        history: The figures of each evaluation, by the number of tokens trained on.
        samples: The rows of samples.jsonl.
        error: The last line of the traceback with which the run ended; empty if it goes on or has ended well.
        damage: For each file or line that cannot be read, what was expected and what was found.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    damage: list[str] = field(default_factory=list)

    def series(self, name: str) -> np.ndarray:
        """Return the finite values of a figure of metrics.jsonl in the order of the rows, (N,); N is 0 without it.

        Example:
            >>> RunRecord(Path("run"), rows=[{"tokens": 8, "kl/token": 0.5}, {"tokens": 16}]).series("kl/token")
            array([0.5])
        """
        values = [row[name] for row in self.rows if isinstance(row.get(name), (int, float))]
        return np.array([value for value in values if math.isfinite(value)], dtype=np.float64)

    def evaluated(self, name: str) -> np.ndarray:
        """Return the finite values of a figure of the evaluations, in their order, (N,)."""
        values = [figures.get(name, math.nan) for _, figures in sorted(self.history.items())]
        return np.array([value for value in values if math.isfinite(value)], dtype=np.float64)

    def setting(self, *keys: str, default: Any = None) -> Any:
        """Return a value of the configuration, by the keys that lead to it; the default for null and without it.

        Example:
            >>> RunRecord(Path("run"), {"kl": {"coef": 0.1}}).setting("kl", "coef")
            0.1
        """
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def tokens(self) -> int:
        """The number of tokens trained on so far."""
        return int(self.rows[-1]["tokens"]) if self.rows else 0


def read_run(folder: str | os.PathLike[str]) -> RunRecord:
    """Read the files of a run; one that is damaged is noted, and the others are read.

    Args:
        folder: The run's folder.

    Raises:
        CommandError: If it is not the folder of a run.
    """
    path = Path(folder)
    damage: list[str] = []
    if not (path / "run.json").is_file():
        raise CommandError(f"Expected the folder of a run, with run.json, got {path}.")
    config = _read(path / "config.yml", _read_config, damage)
    history = _read(path / "history.json", lambda file: read_json(file, HISTORY), damage)
    return RunRecord(
        path,
        config or {},
        _lines(path / "metrics.jsonl", ROW, damage),
        {row["num_timesteps"]: _numbers(row["figures"]) for row in history or []},
        _lines(path / "samples.jsonl", SAMPLE, damage),
        _error(path),
        damage,
    )


def _read(file: Path, read: Callable[[Path], Any], damage: list[str]) -> Any:
    if not file.is_file():
        return None
    try:
        return read(file)
    except (ValueError, CommandError) as error:
        damage.append(str(error))
        return None


def _read_config(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.load(read_yaml(str(file)), Loader)
    return values


def _numbers(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in figures.items()}


def _lines(file: Path, shape: Any, damage: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, without those that are damaged, and without a half-written last one."""
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = []
    # A damaged byte spoils its own line only. `splitlines` would also split at U+2028 within texts.
    *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line, shape, f"line {number} of {file}"))
        except ValueError as error:
            damage.append(str(error))
    return rows


def _error(path: Path) -> str:
    """Return the last line of the log's last traceback, if the run wrote nothing after it."""
    log, metrics = path / "log.txt", path / "metrics.jsonl"
    if not log.is_file() or (path / "results.json").is_file():
        return ""
    if metrics.is_file() and metrics.stat().st_mtime > log.stat().st_mtime:  # it was resumed, and went on
        return ""
    _, found, last = log.read_text(encoding="utf-8", errors="replace").rpartition(TRACEBACK)
    # The lines of the stack are indented; the error begins at the first that is not.
    message = [line for line in last.splitlines() if line and not line.startswith(" ")]
    return message[-1] if found and message else ""
