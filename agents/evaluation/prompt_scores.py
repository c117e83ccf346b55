"""The scores of each prompt in an evaluation, and their file: what intervals over prompts and seeds need afterwards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from textenv.checks.json_files import NOTHING, read_json
from textenv.metrics.model import perplexity
from textenv.metrics.scores import Figure, Scores, mean_of, ratio

from ..files import write_text
from .tables import finite

SCORES_FILE = "scores.json"  # in the folder of `Evaluate`
# The functions from sums to a figure that a file names; `_as_plain` linearises all others.
FIGURES: dict[str, Figure] = {"ratio": ratio, "perplexity": perplexity}
NUMBER = (float, None)  # None stands for NaN and infinity, which JSON does not have
MEASURED = {"figure": (str, NOTHING), "rows": ([[NUMBER]], NOTHING), "whole": (float, None, NOTHING)}
SCORES = [{"num_timesteps": int, "prompts": [str], "scores": {str: MEASURED}}]


class Scored(Protocol):
    """An evaluation as intervals over seeds need it: an `Evaluation`, or `PromptScores` from a file."""

    @property
    def prompts(self) -> Sequence[str]:
        """The text of each prompt."""

    @property
    def scores(self) -> Mapping[str, Scores]:
        """By figure, the contribution of each prompt, one row per prompt."""


class PromptScores(NamedTuple):
    """An evaluation without its texts.

    Attributes:
        prompts: The text of each prompt.
        scores: By figure, the contribution of each prompt, one row per prompt.
    """

    prompts: Sequence[str]
    scores: Mapping[str, Scores]


def linearised(scores: Scores) -> Scores:
    """Return scores whose figure is a mean over rows that agrees with the figure to first order.

    The number of each row is the figure plus the row's influence on it, by the jackknife (Efron, 1982, "The jackknife,
    the bootstrap and other resampling plans", chapter 6). Their mean is the figure; a resample's mean differs from the
    resample's figure by terms of second order in the spread, and not at all where the figure is a mean over rows.

    Args:
        scores: The scores of N rows, which add up.

    Example:
        >>> linearised(mean_of([1.0, 2.0, 6.0])).rows[:, 0].round(6).tolist()
        [1.0, 2.0, 6.0]
    """
    n = len(scores.rows)
    if n < 2:
        return mean_of([scores.value] * n)
    without = np.array([scores.figure(scores.rows.sum(axis=0) - row) for row in scores.rows])  # (N,): one row left out
    return mean_of(scores.value + (n - 1) * (without.mean() - without))


def write_scores(path: str | os.PathLike[str], evaluations: Mapping[int, Scored]) -> None:
    """Write the scores of evaluations, by the number of tokens trained on, as JSON.

    Corpus scores such as SacreBLEU, and figures of metrics of one's own that are neither a mean nor a perplexity, are
    written as `linearised`.
    """
    rows = [
        {
            "num_timesteps": at,
            "prompts": [str(prompt) for prompt in evaluation.prompts],
            "scores": {name: _as_plain(scores) for name, scores in evaluation.scores.items()},
        }
        for at, evaluation in evaluations.items()
    ]
    write_text(path, json.dumps(rows, ensure_ascii=False) + "\n")


def read_scores(path: str | os.PathLike[str]) -> dict[int, PromptScores]:
    """Return what `write_scores` wrote.

    Raises:
        ValueError: If the file is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_scores(f"{folder}/scores.json", {0: PromptScores(["a", "b"], {"reward": mean_of([0.0, 1.0])})})
        ...     read_scores(f"{folder}/scores.json")[0].scores["reward"].value
        0.5
    """
    read = {}
    for row in read_json(path, SCORES):
        scores = {name: _from_plain(plain, f"{name} in {path}") for name, plain in row["scores"].items()}
        read[row["num_timesteps"]] = PromptScores(row["prompts"], scores)
    return read


def scores_in(folder: str | os.PathLike[str]) -> dict[int, PromptScores]:
    """Return the scores in the folder of `Evaluate`; none without a file, as before the first evaluation.

    Raises:
        ValueError: If the file is damaged.
    """
    file = Path(folder) / SCORES_FILE
    return read_scores(file) if file.is_file() else {}


def _as_plain(scores: Scores) -> dict[str, Any]:
    if scores.whole is not None:
        return {"whole": finite(scores.whole)}
    pairs = scores.rows.shape[1] == 2
    name = next((name for name, figure in FIGURES.items() if pairs and figure is scores.figure), None)
    kept = scores if name is not None else linearised(scores)
    return {"figure": name or "ratio", "rows": [list(map(finite, row)) for row in kept.rows.tolist()]}


def _from_plain(plain: Mapping[str, Any], where: str) -> Scores:
    if "whole" in plain:
        return Scores(np.zeros((0, 0)), whole=math.nan if plain["whole"] is None else plain["whole"])
    if plain.get("figure") not in FIGURES or any(len(row) != 2 for row in plain.get("rows", [[]])):
        raise ValueError(f"Expected pairs of sums and the name of a figure for {where}, got {str(plain)[:40]}.")
    return Scores(np.array(plain["rows"], dtype=np.float64).reshape(-1, 2), FIGURES[plain["figure"]])
