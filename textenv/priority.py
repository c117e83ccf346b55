"""Prioritized prompts: more draws for those that earn little, whose reward varies, or that were seldom seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

By = Literal["reward", "spread", "novelty"]

PROMPT_ARRAYS = ("draws", "last_draw", "n_rewards", "mean", "variance")  # of the state, with an entry a prompt


@dataclass(frozen=True)
class PrioritySampling:
    """An order of prompts that draws by priority: `TextEnv(prompts, tokenizer, order=PrioritySampling("reward"))`.

    Prioritized experience replay (Schaul et al. 2016, equation 1, proportional) of prompts, with the staleness of
    prioritized level replay (Jiang et al. 2021):

        P(i) = (1 - staleness) * p_i^alpha / sum_k p_k^alpha + staleness * (c - C_i) / sum_k (c - C_k)

    where c counts the draws and C_i is the count at which prompt i was drawn last (0: never). A draw gives the prompt
    to `samples_per_prompt` episodes. Draws are with replacement, so there are no epochs; with `alpha=0, staleness=0`
    they are uniform. The priority p_i is `epsilon` plus, between 0 and 1,

    - "reward": how far the prompt's recent reward lies below that of the best prompt, as a share of the way to the
      worst. Rewards are an episode's sums as `info["episode"]["r"]` has them, without penalties and shaping; the recent
      one is a moving average, m <- m + rate * (r - m), that begins with the first.
    - "spread": the recent standard deviation of the prompt's reward, as a share of the largest: a prompt that always
      fails or always succeeds teaches nothing, and is drawn by staleness alone until that changes. Its square is
      averaged as v <- (1 - rate) * (v + rate * (r - m)^2).
    - "novelty": 1 / sqrt(n + 1) after n draws (the bonus of count-based exploration, Bellemare et al. 2016).

    A prompt without a reward yet, for "spread" with fewer than two, has the highest priority, 1. Late scores
    (`score_at="rollout_end"`) count when they come. Rows given to `reset` are not counted.
    A draw looks at every prompt: some 0.1 ms where there are 1,000, 7 ms where there are 100,000.
    The gradient follows this distribution of prompts, not the data set's; no importance weights correct that.

    Args:
        by: What makes a priority.
        alpha: The priority exponent: 0 is uniform, 1 proportional, larger ones are greedier.
        staleness: The share of draws that go by how long ago a prompt was drawn, so that none starves.
        rate: How fast the averages follow: 1 keeps the last reward alone.
        epsilon: The least priority.

    Raises:
        ValueError: If an argument lies outside its range.

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

    def cursor(self, n_prompts: int, seed: int) -> PriorityCursor:
        """Return what draws from so many prompts."""
        return PriorityCursor(self, n_prompts, seed)


class PriorityCursor:
    """Which prompt comes next, by priority; its state, rewards and generator included, can be saved and resumed.

    Args:
        sampling: How priorities are made.
        n_prompts: How many prompts there are.
        seed: The seed of the draws.
    """

    def __init__(self, sampling: PrioritySampling, n_prompts: int, seed: int) -> None:
        self.sampling = sampling
        self.seed = seed
        self.number = -1  # that `advance` returned last
        self.n_draws = 0
        self.rng = np.random.default_rng(seed)
        self.draws = np.zeros(n_prompts, dtype=np.int64)
        self.last_draw = np.zeros(n_prompts, dtype=np.int64)
        self.n_rewards = np.zeros(n_prompts, dtype=np.int64)
        self.mean = np.zeros(n_prompts, dtype=np.float64)
        self.variance = np.zeros(n_prompts, dtype=np.float64)

    def observe(self, number: int, reward: float) -> None:
        """Note the reward of an episode of a prompt."""
        rate = self.sampling.rate if self.n_rewards[number] else 1.0
        difference = reward - self.mean[number]
        self.mean[number] += rate * difference
        self.variance[number] = (1 - rate) * (self.variance[number] + rate * difference**2)
        self.n_rewards[number] += 1

    def priorities(self) -> np.ndarray:
        """Return p of each prompt, (N,) float64."""
        if self.sampling.by == "novelty":
            return 1 / np.sqrt(self.draws + 1) + self.sampling.epsilon
        known = self.n_rewards >= (1 if self.sampling.by == "reward" else 2)
        priorities = np.ones(len(known), dtype=np.float64)
        if known.any():
            lacks = self.mean[known].max() - self.mean[known]
            chosen = lacks if self.sampling.by == "reward" else np.sqrt(self.variance[known])
            priorities[known] = chosen / (chosen.max() or 1.0)
        return priorities + self.sampling.epsilon

    def probabilities(self) -> np.ndarray:
        """Return how probable it is that each prompt is drawn next, (N,) float64."""
        by_priority = _shares(self.priorities() ** self.sampling.alpha)
        by_staleness = _shares(self.n_draws - self.last_draw)
        return (1 - self.sampling.staleness) * by_priority + self.sampling.staleness * by_staleness

    def advance(self) -> int:
        """Draw the next prompt and return its number."""
        self.number = int(self.rng.choice(len(self.draws), p=self.probabilities()))
        self.n_draws += 1
        self.draws[self.number] += 1
        self.last_draw[self.number] = self.n_draws
        return self.number

    def state_dict(self) -> dict[str, Any]:
        """Return what the next draws depend on, as what goes into JSON."""
        return {
            "seed": self.seed,
            "number": self.number,
            "n_draws": self.n_draws,
            "rng": self.rng.bit_generator.state,
            "prompts": {name: getattr(self, name).tolist() for name in PROMPT_ARRAYS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.seed, self.number, self.n_draws = state["seed"], state["number"], state["n_draws"]
        self.rng.bit_generator.state = state["rng"]
        for name in PROMPT_ARRAYS:
            getattr(self, name)[:] = state["prompts"][name]


def _shares(weights: np.ndarray) -> np.ndarray:
    """Return weights as shares of their sum; equal ones where all are 0."""
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))
