"""The comparison of two trainings, each of one or more seeds: the probability of improvement and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from textenv.metrics.bootstrap import Estimate
from textenv.metrics.scores import Scores

from .prompt_scores import Scored
from .resampling import Resampling, caution
from .seeds import shared_figures, values_of
from .tables import markdown, shown


class Improvement(NamedTuple):
    """A figure of two trainings, A and B.

    Attributes:
        a: The mean of the figures of A's seeds.
        b: The mean of the figures of B's seeds.
        difference: a - b.
        probability: P(A > B), see `SeedComparison`; None if some prompt has no figure of its own.
    """

    a: Estimate
    b: Estimate
    difference: Estimate
    probability: Estimate | None

    @property
    def higher(self) -> str | None:
        """The training with the higher figure, "a" or "b"; None if that is not shown.

        It is shown if the interval of the difference does not reach 0, and that of the probability not 0.5.
        """
        ends = [(self.difference, 0.0)] + ([] if self.probability is None else [(self.probability, 0.5)])
        if all(one.low is not None and one.low > equal for one, equal in ends):
            return "a"
        if all(one.high is not None and one.high < equal for one, equal in ends):
            return "b"
        return None


@dataclass(frozen=True)
class SeedComparison:
    """The figures of two trainings, A and B, their differences, and the probability that A is higher, with intervals.

    P(A > B) is the probability of improvement of Agarwal et al. (2021, section 4.3, with prompts as tasks): for each
    prompt, the share of pairs of a seed of A and a seed of B in which A's figure is higher, ties counting half (the
    statistic of Mann and Whitney, divided by the number of pairs); then the mean over prompts. If A and B have other
    prompts, it is that share among all pairs of a seed and prompt of A and a seed and prompt of B. It says how often A
    is better, not by how much, which `difference` does.

    `Resampling` says how seeds and prompts are drawn, and what an interval from few seeds cannot say: A's seeds and B's
    are drawn apart, and prompts that both have are drawn once for both, so that the comparison is paired by prompts.

    Attributes:
        a: The evaluations of A, one for each seed: `Evaluation`, or any object with `prompts` and `scores`.
        b: The evaluations of B.
        names: The names of A and B.
        seed: The seed of the resampling.
        n_resamples: The number of resamples.
        figures: The figures by name.
        is_paired: Whether all evaluations have the same prompts.

    Raises:
        ValueError: If A or B has no evaluation, or evaluations with different numbers of prompts.

    Example:
        >>> from agents import PromptScores
        >>> from textenv.metrics import mean_of
        >>> new, old = [[1.0, 0.5, 0.8], [0.9, 0.6, 0.6]], [[0.5, 0.5, 0.7], [0.4, 0.7, 0.5]]
        >>> prompts = ["The", "A", "This"]
        >>> a, b = ([PromptScores(prompts, {"reward": mean_of(row)}) for row in rows] for rows in (new, old))
        >>> reward = SeedComparison(a, b).figures["reward"]
        >>> round(reward.difference.value, 3), round(reward.probability.value, 3), reward.higher
        (0.183, 0.708, None)
    """

    a: Sequence[Scored]
    b: Sequence[Scored]
    names: tuple[str, str] = ("A", "B")
    seed: int = 0
    n_resamples: int = 1000
    figures: dict[str, Improvement] = field(init=False)
    is_paired: bool = field(init=False)

    def __post_init__(self) -> None:
        resampling = Resampling(self.a, self.b, seed=self.seed, n_resamples=self.n_resamples)
        names = shared_figures([*self.a, *self.b])
        object.__setattr__(self, "is_paired", len(resampling.n_prompts) == 1)
        object.__setattr__(self, "figures", {name: self._figure(name, resampling) for name in names})

    def _figure(self, name: str, resampling: Resampling) -> Improvement:
        a, b = ([one.scores[name] for one in group] for group in (self.a, self.b))
        over_prompts = all(scores.whole is None for scores in (*a, *b))
        draw = resampling.estimate

        def mean(group: int, seeds: list[np.ndarray], prompts: list[np.ndarray]) -> np.ndarray:
            return resampling.means(group, (a, b)[group], seeds, prompts)

        return Improvement(
            draw(lambda *drawn: mean(0, *drawn), over_prompts=over_prompts),
            draw(lambda *drawn: mean(1, *drawn), over_prompts=over_prompts),
            draw(lambda *drawn: mean(0, *drawn) - mean(1, *drawn), over_prompts=over_prompts),
            self._probability(a, b, resampling),
        )

    def _probability(self, a: list[Scores], b: list[Scores], resampling: Resampling) -> Estimate | None:
        of_a, of_b = values_of(a), values_of(b)
        if of_a is None or of_b is None:
            return None
        if self.is_paired:
            wins = is_higher(of_a[:, None], of_b[None, :])  # (n_a, n_b, P)

            def paired(seeds: list[np.ndarray], prompts: list[np.ndarray]) -> np.ndarray:
                drawn = [shares(rows, n) for rows, n in zip((*seeds, prompts[0]), wins.shape, strict=True)]
                return np.einsum("bi,bj,bp,ijp->b", *drawn, wins, optimize=True)

            return resampling.estimate(paired)
        return resampling.estimate(
            lambda seeds, prompts: np.array(
                [
                    mann_whitney(ours.ravel(), theirs.ravel())
                    for ours, theirs in zip(
                        resampling.of_prompts(0, of_a, seeds, prompts),
                        resampling.of_prompts(1, of_b, seeds, prompts),
                        strict=True,
                    )
                ]
            )
        )

    @property
    def note(self) -> str:
        """What the table is made of, and what it cannot say."""
        groups = zip(self.names, (self.a, self.b), strict=True)
        sizes = [f"{name}: {len(group)} seed{'s' * (len(group) > 1)}" for name, group in groups]
        prompts = f"the same {len(self.a[0].prompts)} prompts" if self.is_paired else "other prompts"
        return f"{', '.join(sizes)}; {prompts}. {caution(min(len(self.a), len(self.b)))}"

    def to_markdown(self) -> str:
        """Return the figures as a Markdown table, with a note."""
        a, b = self.names
        rows = [
            [
                name,
                shown(figure.a),
                shown(figure.b),
                shown(figure.difference, sign="+"),
                shown(figure.probability),
                {"a": a, "b": b, None: "not shown"}[figure.higher],
            ]
            for name, figure in self.figures.items()
        ]
        head = ["figure", a, b, "difference", f"P({a} > {b})", "higher"]
        return f"{markdown(head, rows)}\n\n{self.note}"


def is_higher(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return 1 where a is higher, 0 where b is, and 0.5 where they are equal; the arrays are broadcast.

    Example:
        >>> is_higher(np.array([1.0, 2.0, 3.0]), np.array(2.0)).tolist()
        [0.0, 0.5, 1.0]
    """
    return (a > b) + 0.5 * (a == b)


def mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of pairs of a value of a, (N,), and one of b, (M,), in which a is higher; ties count half.

    Example:
        >>> mann_whitney(np.array([1.0, 2.0]), np.array([0.0, 2.0]))
        0.625
    """
    ordered = np.sort(b)
    below, up_to = np.searchsorted(ordered, a, side="left"), np.searchsorted(ordered, a, side="right")
    return float((below + up_to).mean() / (2 * len(b)))


def shares(rows: np.ndarray, n: int) -> np.ndarray:
    """Return how often each of n rows is among the drawn ones, (B, n), divided by the number of draws in a resample."""
    return np.stack([np.bincount(drawn, minlength=n) for drawn in rows]) / rows.shape[1]
