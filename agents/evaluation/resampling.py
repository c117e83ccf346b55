"""The bootstrap over seeds and prompts at once: which of them are drawn, and the figures of what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from textenv.metrics.bootstrap import Estimate, figures_of, with_interval
from textenv.metrics.scores import Scores

from .prompt_scores import Scored

# The coverage of intervals of 95 % where seeds differ much more than prompts do, in per cent, by the number of seeds;
# see `Resampling`.
COVERAGE = {2: 50, 3: 75, 4: 80, 5: 83}

Figures = Callable[[list[np.ndarray], list[np.ndarray]], np.ndarray]


class Resampling:
    """The seeds and prompts of one or more groups of evaluations, to draw from.

    The seeds of a group are drawn with replacement, as many as there are, and so are the prompts. Evaluations with the
    same prompts get the same draws of prompts: those are crossed with the seeds (the pigeonhole bootstrap; Owen, 2007,
    "The pigeonhole bootstrap"), since a hard prompt is hard for every seed. Drawing the prompts of each seed apart
    would divide what prompts contribute by the number of seeds: with ten seeds, intervals of 95 % then cover 70 %.
    Evaluations with other prompts get draws of their own. An interval is the range between the 2.5 % and 97.5 %
    quantiles of the draws (as in Agarwal et al., 2021, "Deep reinforcement learning at the edge of the statistical
    precipice", whose tasks are our prompts), by `scipy.stats.bootstrap`.

    A single seed cannot be drawn from: the interval is then over prompts alone, and says nothing about another seed.
    From two or more seeds it says little as long as they are few, since no draw leaves the range of the seeds at hand.
    Where seeds differ much more than prompts do, intervals of 95 % contain the true mean in 50 % of all cases with 2
    seeds, 75 % with 3, 83 % with 5 and 90 % with 10; where seeds do not differ, in 95 % or more.

    Args:
        *groups: The evaluations of each group, one for each seed.
        seed: The seed of the draws.
        n_resamples: The number of draws.

    Attributes:
        which: By group and evaluation, the number of its list of prompts.
        n_seeds: By group, the number of evaluations.
        n_prompts: By list of prompts, the number of prompts.

    Raises:
        ValueError: If a group is empty or has evaluations of different numbers of prompts, or evaluations of the same
            prompts have different numbers of rows.

    Example:
        >>> from agents import PromptScores
        >>> from textenv.metrics.scores import mean_of
        >>> group = [PromptScores(["a", "b"], {"reward": mean_of(row)}) for row in ([0.0, 1.0], [1.0, 1.0])]
        >>> Resampling(group).estimate(lambda seeds, prompts: seeds[0].mean(axis=1))
        Estimate(value=0.5, low=0.0, high=1.0)
    """

    def __init__(self, *groups: Sequence[Scored], seed: int = 0, n_resamples: int = 1000) -> None:
        if not all(groups):
            raise ValueError("Expected the evaluation of at least one seed in each group, got a group without any.")
        lists: dict[tuple[str, ...], int] = {}
        self.which = [[lists.setdefault(tuple(map(str, one.prompts)), len(lists)) for one in group] for group in groups]
        self.n_seeds = [len(group) for group in groups]
        rows: list[set[int]] = [set() for _ in lists]
        for group, which in zip(groups, self.which, strict=True):
            for one, number in zip(group, which, strict=True):
                rows[number] |= {len(scores.rows) for scores in one.scores.values() if scores.whole is None}
        if any(len(numbers) > 1 for numbers in rows):
            found = next(sorted(numbers) for numbers in rows if len(numbers) > 1)
            raise ValueError(f"Expected one row of scores for each prompt, got {' and '.join(map(str, found))} rows.")
        self.n_prompts = [numbers.pop() if numbers else 1 for numbers in rows]
        for which in self.which:
            if len(sizes := {self.n_prompts[number] for number in which}) > 1:
                raise ValueError(f"Expected equally many prompts for all seeds, got {sorted(sizes)}.")
        self.seed, self.n_resamples = seed, n_resamples

    def estimate(self, figures: Figures, over_prompts: bool = True) -> Estimate:
        """Return the figure of all seeds and prompts, each drawn once, with its interval.

        Args:
            figures: The function from draws to figures, (B,): it takes the numbers of the seeds drawn, (B, n_seeds) for
                each group, and those of the prompts drawn, (B, n_prompts) for each list of prompts.
            over_prompts: Whether to draw prompts; False for a figure whose texts cannot be resampled.
        """
        sizes = [*self.n_seeds, *self.n_prompts]
        n_groups = len(self.n_seeds)
        drawn = [kind for kind, n in enumerate(sizes) if n > 1 and (over_prompts or kind < n_groups)]

        def of(*draws: np.ndarray) -> np.ndarray:
            everything = [np.arange(n)[None].repeat(len(draws[0]), axis=0) for n in sizes]
            for kind, rows in zip(drawn, draws, strict=True):
                everything[kind] = rows
            return figures(everything[:n_groups], everything[n_groups:])

        once = [np.arange(n)[None] for n in sizes]
        value = float(figures(once[:n_groups], once[n_groups:])[0])
        return with_interval(
            value, of, [sizes[kind] for kind in drawn], self.seed, self.n_resamples, method="percentile"
        )

    def of_each(self, group: int, scores: Sequence[Scores], prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the figure of each seed of a group for each draw of prompts, (B, n_seeds).

        Args:
            group: The number of the group.
            scores: The scores of each of its evaluations.
            prompts: The draws of each list of prompts.
        """
        n_draws = len(prompts[0])
        columns = [
            np.full(n_draws, one.value) if one.whole is not None else figures_of(one, prompts[which])
            for one, which in zip(scores, self.which[group], strict=True)
        ]
        return np.stack(columns, axis=1)

    def means(
        self, group: int, scores: Sequence[Scores], seeds: Sequence[np.ndarray], prompts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return the mean figure of the seeds drawn from a group, (B,); the arguments are those of `of_each`."""
        return np.take_along_axis(self.of_each(group, scores, prompts), seeds[group], axis=1).mean(axis=1)

    def of_prompts(
        self, group: int, values: np.ndarray, seeds: Sequence[np.ndarray], prompts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return the values of the seeds and prompts drawn from a group, (B, n_seeds, P).

        Args:
            group: The number of the group.
            values: The value of each seed and prompt, (n_seeds, P).
            seeds: The draws of each group's seeds.
            prompts: The draws of each list of prompts.
        """
        own = sorted(set(self.which[group]))  # the lists of prompts of this group: as long as each other
        which = np.searchsorted(own, np.array(self.which[group])[seeds[group]])  # (B, n_seeds): that of each seed drawn
        columns = np.stack([prompts[number] for number in own], axis=1)  # (B, lists, P)
        return values[seeds[group][:, :, None], columns[np.arange(len(which))[:, None], which]]


def caution(n_seeds: int) -> str:
    """Return what the intervals of this many seeds are over, and what they cannot say.

    Example:
        >>> caution(1)
        'Intervals of 95 % are over prompts alone, and say nothing about another seed.'
    """
    if n_seeds == 1:
        return "Intervals of 95 % are over prompts alone, and say nothing about another seed."
    text = "Intervals of 95 % are over seeds and prompts."
    if n_seeds not in COVERAGE:
        return text
    return (
        f"{text} {n_seeds} seeds are few: where seeds differ much more than prompts do, such an interval contains the "
        f"true mean in {COVERAGE[n_seeds]} % of all cases."
    )
