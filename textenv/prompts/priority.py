"""The order of prompts by priority: low rewards, varying rewards or rarely drawn prompts first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np

By = Literal["reward", "spread", "novelty"]

Item = TypeVar("Item")

PROMPT_ARRAYS = ("draws", "last_draw", "n_rewards", "mean", "variance")  # of `PriorityCursor`, one entry a prompt


@dataclass(frozen=True)
class PrioritySampling:
    """The order of prompts by priority: `TextEnv(prompts, tokenizer, order=PrioritySampling("reward"))`.

    This is prioritized experience replay (Schaul et al. 2016, equation 1, proportional) of prompts, with the staleness
    of prioritized level replay (Jiang et al. 2021): prompt i is drawn with the probability

        P(i) = (1 - staleness) * p_i^alpha / sum_k p_k^alpha + staleness * (c - C_i) / sum_k (c - C_k)

    where c is the number of draws so far, and C_i the number of the draw in which prompt i came last (0: never). Each
    draw gives the prompt to `samples_per_prompt` episodes. Draws are with replacement, so there are no epochs;
    `alpha=0, staleness=0` draws uniformly. The priority p_i is `epsilon` plus a number between 0 and 1:

    - "reward": (best - m_i) / (best - worst), where m_i is the mean reward of the prompt, and best and worst are the
      highest and lowest mean of all prompts. Rewards are those of whole episodes, `info["episode"]["r"]`, without KL
      penalties and shaping. The mean is a moving average that starts at the first reward: m <- m + rate * (r - m).
    - "spread": the standard deviation of the rewards of the prompt, divided by the largest one. A prompt that always
      fails or always succeeds teaches nothing; it is drawn through staleness only, until that changes. The variance is
      a moving average as well: v <- (1 - rate) * (v + rate * (r - m)^2).
    - "novelty": 1 / sqrt(n + 1) after n draws (the bonus of count-based exploration, Bellemare et al. 2016).

    A prompt with no reward yet (for "spread": with fewer than two) has the highest priority, 1. Late scores
    (`score_at="rollout_end"`) count once they are known. Episodes of rows that the user passes to `reset` do not count.
    A draw computes the probabilities of all prompts: 0.1 ms with 1,000 prompts and 7 ms with 100,000.
    W processes that train together draw from one table (see `PriorityCursor`), and each computes the draws of all.
    There are no importance weights: the policy is trained on this distribution of prompts, not on that of the data set.

    Args:
        by: The source of the priority.
        alpha: The exponent of the priority: 0 is uniform, 1 proportional, more is greedier.
        staleness: The weight of the second term, which favours prompts drawn long ago, so that every prompt returns.
        rate: The weight of the newest reward in the averages; 1 keeps the newest only.
        epsilon: The lowest priority.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> cursor = PrioritySampling("reward", staleness=0.0, epsilon=0.0).cursor(3, seed=0)
        >>> for number, reward in enumerate([1.0, 0.0, 0.5]):
        ...     cursor.observe(number, reward)
        >>> cursor.probabilities().round(2).tolist()
        [0.0, 0.67, 0.33]
    """

    by: By = "reward"
    alpha: float = 1.0
    staleness: float = 0.1
    rate: float = 0.3
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ValueError(f"Expected `by` to be one of {list(get_args(By))}, got {self.by!r}.")
        for name in ("alpha", "epsilon"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"Expected `{name}` to be at least 0 and finite, got {getattr(self, name)}.")
        if not 0 <= self.staleness <= 1:
            raise ValueError(f"Expected `staleness` in [0, 1], for it is a share, got {self.staleness}.")
        if not 0 < self.rate <= 1:
            raise ValueError(f"Expected `rate` above 0 and at most 1, got {self.rate}.")

    def cursor(self, n_prompts: int, seed: int, shard: tuple[int, int] = (0, 1)) -> PriorityCursor:
        """Return the cursor that draws from `n_prompts` prompts, with a seed; see there for `shard`."""
        return PriorityCursor(self, n_prompts, seed, shard)


class News(NamedTuple):
    """What a process has drawn and earned since all processes agreed on the table of prompts.

    Attributes:
        draws: The numbers of its prompts, in the order of its draws.
        rewards: The numbers and rewards of its finished episodes, in the order in which they became known.
        rng: The state of its generator, after its last draw.
    """

    draws: list[int]
    rewards: list[tuple[int, float]]
    rng: Mapping[str, Any]


class PriorityCursor:
    """The draws of prompts by priority; its state holds rewards and random generator, so that a run can be resumed.

    W processes share one table and one sequence of draws: each process computes the whole sequence, and takes every
    W-th draw. So no draw is used twice, and a prompt is drawn as often as one process would draw it. What episodes have
    earned enters the table when the processes agree: they exchange their `news` and pass all of them to `agree`, once a
    rollout for example. One process has nothing to agree on: its rewards count at once.

    Args:
        sampling: The definition of priorities.
        n_prompts: The number of prompts, N.
        seed: The seed of the draws, the same in all processes.
        shard: (r, w) where w processes share the draws: this process takes every w-th, starting with draw r since they
            agreed (r counts from 0).

    Attributes:
        number: The prompt that `advance` returned last, -1 before.
        n_draws: The number of draws so far, those of other processes up to the last one of this process included.
        draws: The number of draws of each prompt, (N,) int64.
        last_draw: The number of the draw in which each prompt came last, from 1; 0 for never, (N,) int64.
        n_rewards: The number of known rewards of each prompt, (N,) int64.
        mean: The moving average of each prompt's rewards, (N,) float64.
        variance: Their variance, a moving average as well, (N,) float64.

    Example:
        >>> first, second = (PrioritySampling().cursor(5, seed=0, shard=(rank, 2)) for rank in (0, 1))
        >>> drawn = [first.advance(), second.advance(), first.advance(), second.advance()]
        >>> one = PrioritySampling().cursor(5, seed=0)
        >>> drawn == [one.advance() for _ in range(4)]
        True
        >>> second.observe(drawn[1], 1.0)
        >>> news = [first.news(), second.news()]
        >>> first.agree(news)
        >>> first.n_draws, float(first.mean[drawn[1]])
        (4, 1.0)
    """

    def __init__(self, sampling: PrioritySampling, n_prompts: int, seed: int, shard: tuple[int, int] = (0, 1)) -> None:
        self.sampling = sampling
        self.seed = seed
        self.shard = shard
        self.number = -1
        self.n_draws = 0
        self.rng = np.random.default_rng(seed)
        self.draws = np.zeros(n_prompts, dtype=np.int64)
        self.last_draw = np.zeros(n_prompts, dtype=np.int64)
        self.n_rewards = np.zeros(n_prompts, dtype=np.int64)
        self.mean = np.zeros(n_prompts, dtype=np.float64)
        self.variance = np.zeros(n_prompts, dtype=np.float64)
        self._mark_agreed()

    def _mark_agreed(self) -> None:
        """Keep the counts that all processes have agreed on, from which each of them draws ahead for all."""
        self._agreed = self.n_draws, self.draws.copy(), self.last_draw.copy()
        self._own_draws: list[int] = []
        self._own_rewards: list[tuple[int, float]] = []

    def observe(self, number: int, reward: float) -> None:
        """Update the averages of a prompt with the reward of a finished episode; of several processes, in `agree`.

        Args:
            number: The number of the prompt.
            reward: The sum of the episode's rewards.
        """
        if self.shard[1] > 1:
            self._own_rewards.append((number, float(reward)))
        else:
            self._average(number, reward)

    def _average(self, number: int, reward: float) -> None:
        rate = self.sampling.rate if self.n_rewards[number] else 1.0  # the averages start at the first reward
        difference = reward - self.mean[number]
        self.mean[number] += rate * difference
        self.variance[number] = (1 - rate) * (self.variance[number] + rate * difference**2)
        self.n_rewards[number] += 1

    def priorities(self) -> np.ndarray:
        """Return p of each prompt, (N,) float64."""
        if self.sampling.by == "novelty":  # needs no reward
            return 1 / np.sqrt(self.draws + 1) + self.sampling.epsilon
        # The variance of a single reward is 0, which would mark the prompt as one that teaches nothing.
        known = self.n_rewards >= (1 if self.sampling.by == "reward" else 2)
        priorities = np.ones(len(known), dtype=np.float64)
        if known.any():
            below_best = self.mean[known].max() - self.mean[known]
            chosen = below_best if self.sampling.by == "reward" else np.sqrt(self.variance[known])
            priorities[known] = chosen / (chosen.max() or 1.0)  # all 0 where all prompts are alike
        return priorities + self.sampling.epsilon

    def probabilities(self) -> np.ndarray:
        """Return the probability that each prompt is drawn next, (N,) float64."""
        by_priority = _shares(self.priorities() ** self.sampling.alpha)
        by_staleness = _shares(self.n_draws - self.last_draw)  # (N,); equal shares before the first draw
        return (1 - self.sampling.staleness) * by_priority + self.sampling.staleness * by_staleness

    def advance(self) -> int:
        """Draw the next prompt and return its number."""
        (rank, size), n_agreed = self.shard, self._agreed[0]
        while True:
            turn = (self.n_draws - n_agreed) % size  # the rank of the process that takes this draw
            number = int(self.rng.choice(len(self.draws), p=self.probabilities()))
            self._count(number)
            if turn == rank:
                break
        if size > 1:
            self._own_draws.append(number)
        self.number = number
        return number

    def _count(self, number: int) -> None:
        self.n_draws += 1
        self.draws[number] += 1
        self.last_draw[number] = self.n_draws

    def news(self) -> News:
        """Return what this process has drawn and earned since the processes agreed."""
        return News(self._own_draws, self._own_rewards, self.rng.bit_generator.state)

    def agree(self, news: Sequence[News]) -> None:
        """Bring the table up to date with the news of all processes, after which it is the same in all of them.

        Draws and rewards count in turns: the first ones of all processes in the order of their ranks, then the second
        ones. Draws that this process has computed and that no process has taken do not count. All continue with the
        generator of the process that has come furthest.

        Args:
            news: What `news` returned in each process, by rank.
        """
        self.n_draws, self.draws, self.last_draw = self._agreed
        for number in _in_turns([own.draws for own in news]):
            self._count(number)
        for number, reward in _in_turns([own.rewards for own in news]):
            self._average(number, reward)
        furthest = max(range(len(news)), key=lambda rank: (len(news[rank].draws), rank))
        self.rng.bit_generator.state = news[furthest].rng
        self._mark_agreed()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next draws depend on, ready for JSON.

        Raises:
            RuntimeError: If there are news that the other processes do not have.
        """
        if self._own_draws or self._own_rewards:
            raise RuntimeError("Expected processes that have agreed on their draws to be saved: call `agree` first.")
        return {
            "seed": self.seed,
            "number": self.number,
            "n_draws": self.n_draws,
            "rng": self.rng.bit_generator.state,
            "prompts": {name: getattr(self, name).tolist() for name in PROMPT_ARRAYS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.seed, self.number, self.n_draws = state["seed"], state["number"], state["n_draws"]
        self.rng.bit_generator.state = state["rng"]
        for name in PROMPT_ARRAYS:
            getattr(self, name)[:] = state["prompts"][name]
        self._mark_agreed()


def _shares(weights: np.ndarray) -> np.ndarray:
    """Return weights divided by their sum; equal shares if all are 0."""
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))


def _in_turns(lists: Sequence[Sequence[Item]]) -> Iterator[Item]:
    """Yield the first item of each list, then the second of each, and so on; lists may end before others."""
    nothing = object()  # an item may be None
    for items in zip_longest(*lists, fillvalue=nothing):
        yield from (item for item in items if item is not nothing)  # type: ignore[misc]
