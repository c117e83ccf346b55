"""The reader of a run's folder: everything that a report shows of the run, as one plain object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from textenv.checks.json_files import read_json

from ..configuration.plain_yaml import Loader, read_yaml
from ..errors import CommandError
from ..evaluation.evaluation_files import BEST, HISTORY
from ..evaluation.prompt_scores import PromptScores, scores_in
from ..runs.folder import SAMPLE, TOKENS, RunFolder, read_rows

CREDIT_FILE = "credit.json"
CREDIT = [
    {"prompt": str, "tokens": [str], **{name: [(float, None)] for name in ("critic", "monte_carlo", "low", "high")}}
]


@dataclass(frozen=True)
class RunData:
    """What a run has left in its folder, whether it is finished, running or broken.

    Attributes:
        name: The name of the folder.
        config: The configuration, by dotted key.
        started: The time of its start, in ISO format.
        versions: The versions of packages, by name.
        is_finished: Whether it trained to its end.
        rows: The rows of metrics.jsonl.
        samples: The rows of samples.jsonl.
        tokens: The rows of tokens.jsonl.
        history: The evaluations: `num_timesteps` and `figures`.
        scores: The scores of each prompt in the first and the newest evaluation, by the number of tokens.
        best: The figure, value and number of tokens of the best model; None before one is kept.
        credit: The values of prefixes by Monte Carlo, if somebody measured them: the content of credit.json.

    Example:
        >>> from agents.report.run_data import read_run
        >>> # read_run("runs/demo").history[-1]["figures"]["reward"]
    """

    name: str
    config: Mapping[str, Any]
    started: str
    versions: Mapping[str, str]
    is_finished: bool
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    history: list[dict[str, Any]]
    scores: Mapping[int, PromptScores]
    best: Mapping[str, Any] | None
    credit: list[dict[str, Any]]


def read_run(path: str | os.PathLike[str]) -> RunData:
    """Read the folder of a run.

    Raises:
        CommandError: If it is not one, or a file in it is damaged; the message names the file.
    """
    run = RunFolder.open(path)
    about = run.read_about()
    config = yaml.load(read_yaml(str(run.config)), Loader) if run.config.is_file() else {}
    try:
        return RunData(
            name=run.path.resolve().name,
            config=flat(config),
            started=about["started"],
            versions=about["versions"],
            is_finished=run.is_finished(),
            rows=read_rows(run.metrics),
            samples=read_rows(run.samples, SAMPLE),
            tokens=read_rows(run.tokens, TOKENS),
            history=_json(run.path / "history.json", HISTORY, []),
            scores=scores_in(run.path),
            best=_json(run.best / "best.json", BEST, None),
            credit=_json(run.path / CREDIT_FILE, CREDIT, []),
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def _json(file: Path, shape: Any, missing: Any) -> Any:
    return read_json(file, shape) if file.is_file() else missing


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration by dotted key; the arguments of a class count as one value.

    Example:
        >>> flat({"kl": {"coef": 0.1}, "env": {"args": {"a": 1}}})
        {'kl.coef': 0.1, 'env.args': {'a': 1}}
    """
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key != "args" and not key.endswith("_args"):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
