"""The figures of several seeds: means and interquartile means before and after, and the spread between the seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from textenv.metrics.bootstrap import Estimate, estimate
from textenv.metrics.scores import Scores

from ..files import write_text
from .prompt_scores import Scored
from .resampling import Resampling, caution
from .tables import cell, finite, markdown, plain, shown


class SeedFigure(NamedTuple):
    """A figure of several seeds.

    Attributes:
        after: The mean of the seeds' figures after training.
        before: The same before training; None without evaluations from before.
        difference: after - before, with the same seeds and prompts drawn for both.
        iqm_after: The interquartile mean after training: the mean of the middle half of the figures of all prompts of
            all seeds (Agarwal et al., 2021, with prompts as tasks). None if some prompt has no figure of its own.
        iqm_before: The same before training.
        seeds: The figure of each seed after training, with its own interval over prompts (BCa, as in `Evaluation`).
    """

    after: Estimate
    before: Estimate | None
    difference: Estimate | None
    iqm_after: Estimate | None
    iqm_before: Estimate | None
    seeds: list[Estimate]

    @property
    def between(self) -> float:
        """The distance from the lowest seed to the highest."""
        return max(one.value for one in self.seeds) - min(one.value for one in self.seeds)

    @property
    def within(self) -> float | None:
        """The mean width of the seeds' own intervals; None if a seed has none."""
        widths = [one.high - one.low for one in self.seeds if one.low is not None and one.high is not None]
        return sum(widths) / len(widths) if len(widths) == len(self.seeds) else None


@dataclass(frozen=True)
class SeedTable:
    """The figures of one training with several seeds, each with its 95 % interval over seeds and prompts.

    `Resampling` says how seeds and prompts are drawn, and what an interval from few seeds cannot say. Figures that no
    resample of texts can show, such as distinct n-grams, have an interval over seeds alone.

    Attributes:
        after: The evaluation after training of each seed: `Evaluation`, or any object with `prompts` and `scores`.
        before: The evaluation of each seed before training, of the same prompts; empty for none.
        names: The names of the seeds; by default their numbers, from 0.
        seed: The seed of the resampling.
        n_resamples: The number of resamples.
        figures: The figures by name.

    Raises:
        ValueError: If the numbers of evaluations differ, or those of their prompts, or a seed's evaluations before and
            after training have different prompts.

    Example:
        >>> from agents import PromptScores
        >>> from textenv.metrics import mean_of
        >>> prompts = ["The", "A", "This", "It"]
        >>> rewards = [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]
        >>> table = SeedTable([PromptScores(prompts, {"reward": mean_of(row)}) for row in rewards])
        >>> reward = table.figures["reward"]
        >>> [round(number, 2) for number in (*reward.after, reward.iqm_after.value, reward.between, reward.within)]
        [0.67, 0.25, 1.0, 0.83, 0.25, 0.83]
    """

    after: Sequence[Scored]
    before: Sequence[Scored] = ()
    names: Sequence[str] = ()
    seed: int = 0
    n_resamples: int = 1000
    figures: dict[str, SeedFigure] = field(init=False)

    def __post_init__(self) -> None:
        names = list(self.names) or [str(number) for number in range(len(self.after))]
        if len(names) != len(self.after) or len(self.before) not in (0, len(self.after)):
            raise ValueError(
                f"Expected as many names and evaluations before as after, got {len(names)}, {len(self.before)} and "
                f"{len(self.after)}."
            )
        for name, early, late in zip(names, self.before, self.after, strict=False):
            if list(early.prompts) != list(late.prompts):
                raise ValueError(f"Expected the same prompts before and after training, got others for seed {name}.")
        resampling = Resampling(self.after, seed=self.seed, n_resamples=self.n_resamples)
        object.__setattr__(self, "names", names)
        object.__setattr__(
            self, "figures", {name: self._figure(name, resampling) for name in shared_figures(self.after)}
        )

    def _figure(self, name: str, resampling: Resampling) -> SeedFigure:
        after = [one.scores[name] for one in self.after]
        before = [one.scores[name] for one in self.before] if name in shared_figures(self.before) else []
        over_prompts = all(scores.whole is None for scores in (*after, *before))

        def mean(*terms: tuple[int, list[Scores]]) -> Estimate:
            """Return the sum of the means of some scores, each with a sign."""
            return resampling.estimate(
                lambda seeds, prompts: sum(sign * resampling.means(0, some, seeds, prompts) for sign, some in terms),  # type: ignore[arg-type, return-value]
                over_prompts=over_prompts,
            )

        return SeedFigure(
            mean((1, after)),
            mean((1, before)) if before else None,
            mean((1, after), (-1, before)) if before else None,
            _interquartile(resampling, after),
            _interquartile(resampling, before) if before else None,
            [estimate(scores, self.seed, self.n_resamples) for scores in after],
        )

    @property
    def note(self) -> str:
        """What the table is made of, and what it cannot say."""
        n_seeds, n_prompts = len(self.after), len(self.after[0].prompts)
        shared = len({tuple(map(str, one.prompts)) for one in self.after}) == 1
        size = f"{n_seeds} seed{'s' * (n_seeds > 1)}, {n_prompts} prompts{'' if shared else ' each'}"
        return f"{size}. {caution(n_seeds)}"

    def to_markdown(self) -> str:
        """Return a table over all seeds, one with the seeds apart, and a note."""
        rows, apart = [], []
        for name, figure in self.figures.items():
            compared = [shown(figure.before), shown(figure.after), shown(figure.difference, sign="+")]
            middle = [shown(figure.iqm_before), shown(figure.iqm_after)]
            rows.append([name, *compared, *middle])
            apart.append([name, *map(shown, figure.seeds), cell(figure.between), cell(figure.within)])
        head = ["figure", "mean before", "mean after", "difference", "IQM before", "IQM after"]
        if not self.before:
            head, rows = ["figure", "mean", "IQM"], [[row[0], row[2], row[5]] for row in rows]
        seeds = ["figure", *(f"seed {name}" for name in self.names), "lowest to highest", "width of one interval"]
        return f"{markdown(head, rows)}\n\n{markdown(seeds, apart)}\n\n{self.note}"

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON; None stands for a number that is not finite."""
        figures = {}
        for name, figure in self.figures.items():
            numbers = figure._asdict()
            seeds = dict(zip(self.names, map(plain, numbers.pop("seeds")), strict=True))
            spread = {"lowest_to_highest": figure.between, "width_of_one_interval": figure.within}
            figures[name] = {
                **{key: None if value is None else plain(value) for key, value in numbers.items()},
                "seeds": seeds,
                **{key: finite(value) for key, value in spread.items()},
            }
        return {"n_prompts": len(self.after[0].prompts), "figures": figures, "note": self.note}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the files `path` + ".json" and `path` + ".md", each of them whole or not at all."""
        write_text(f"{os.fspath(path)}.json", json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")
        write_text(f"{os.fspath(path)}.md", self.to_markdown() + "\n")


def shared_figures(evaluations: Sequence[Scored]) -> list[str]:
    """Return the figures that all evaluations have, in the order of the first."""
    first = list(evaluations[0].scores) if evaluations else []
    return [name for name in first if all(name in one.scores for one in evaluations)]


def values_of(scores: Sequence[Scores]) -> np.ndarray | None:
    """Return the figure of each prompt of each seed, (n_seeds, P); None if a prompt has no figure of its own."""
    rows = [one.per_row for one in scores]
    values = np.stack([row for row in rows if row is not None]) if all(row is not None for row in rows) else None
    return values if values is not None and np.isfinite(values).all() else None


def _interquartile(resampling: Resampling, scores: Sequence[Scores]) -> Estimate | None:
    from scipy.stats import trim_mean  # here, since scipy takes as long to import as all of textenv

    values = values_of(scores)
    if values is None:
        return None

    def middle(seeds: list[np.ndarray], prompts: list[np.ndarray]) -> np.ndarray:
        drawn = resampling.of_prompts(0, values, seeds, prompts)  # (B, n_seeds, P)
        return np.asarray(trim_mean(drawn.reshape(len(drawn), -1), 0.25, axis=1))  # a quarter off each end

    return resampling.estimate(middle)
