"""The gap between a trained reward and a judge: how far the reward has risen ahead, in deviations of the start."""

from __future__ import annotations

import math

import numpy as np

from textenv.metrics.scores import Scores

from .prompt_scores import Scored

ROUNDING = 1e-9  # a deviation below this share of the largest score is rounding: all scores are equal

FIGURES = ("reward", "judge")


def judge_gap(start: Scored, now: Scored) -> float:
    """Return the rise of `reward` since the start minus the rise of `judge`.

    Each rise is in standard deviations of that figure over the prompts at the start, so that the two have one scale: a
    gap of 1 says that the reward has risen by one deviation more than the judge. At the start it is 0. A gap that grows
    while the judge falls is overoptimisation (Gao et al., 2023, arXiv 2210.10760, whose gold reward is the judge here).
    A gap that grows while both rise may only say that the judge is less sensitive.

    Args:
        start: The first evaluation of a run.
        now: A later one, of the same prompts.

    Returns:
        NaN if one of the two has fewer than two prompts with a score, or equal scores for all of them at the start.

    Example:
        >>> from agents.evaluation.judge_gap import judge_gap
        >>> from agents.evaluation.prompt_scores import PromptScores
        >>> from textenv.metrics import mean_of
        >>> def scores(reward, judge):
        ...     return PromptScores(["a", "b"], {"reward": mean_of(reward), "judge": mean_of(judge)})
        >>> round(judge_gap(scores([0.0, 2.0], [0.0, 20.0]), scores([2.0, 4.0], [5.0, 25.0])), 3)  # 2 / 1.41 - 5 / 14.1
        1.061
    """
    rises = [(now.scores[name].value - start.scores[name].value) / _deviation(start.scores[name]) for name in FIGURES]
    return rises[0] - rises[1]


def _deviation(scores: Scores) -> float:
    """Return the standard deviation of the prompts' scores; NaN if they have none."""
    assert scores.per_row is not None, "means of scores"
    rows = scores.per_row[np.isfinite(scores.per_row)]  # without prompts all of whose texts were dropped
    deviation = float(np.std(rows, ddof=1)) if len(rows) > 1 else 0.0
    return deviation if deviation > ROUNDING * max(1.0, float(np.abs(rows).max(initial=0.0))) else math.nan
