"""Truncated or masked importance weights for tokens that were sampled from another distribution than the policy's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

MOST_NATS = 80.0  # exp(88.7) is the largest float32

Per: TypeAlias = Literal["token", "sequence"]


@dataclass(frozen=True)
class Correction:
    """Truncated importance weights, min(pi / mu, truncation), for training pi on tokens that mu sampled.

    Truncation bounds the variance and pulls towards mu (Ionides, 2008, "Truncated Importance Sampling"); for the gap
    between the engine that samples and the one that trains: Yao et al., 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training".

    - "token": each token is weighted by its own ratio. This corrects the choice of the token, but not the difference
      between the texts that mu and the policy would write before and after it. The closer the two distributions are,
      the closer the ratios are to 1, however long the text.
    - "sequence": each token is weighted by the product of all ratios of its sequence. Without truncation, and with
      whole episodes, the mean of the weighted gradients is the policy gradient itself. The variance of the product
      grows with the number of tokens, so that it suits short texts.

    With `band`, tokens whose ratio is outside of it get weight 0, so that the update leaves them out: a very small or
    large ratio is often a token on which the two programs disagree, rather than one that the policy has come to like.
    `truncation=math.inf, band=(low, high)` is IcePop (Ring team, 2025, "Every Step Evolves", arXiv 2510.18855: 0.5 and
    5 for tokens); `band=(0, high)` masks large ratios alone. What is masked is a bias, towards tokens on which
    both agree.

    Args:
        truncation: The largest weight, 1 or more; `math.inf` for no truncation.
        per: "token" or "sequence".
        band: The smallest and the largest ratio that is trained on, before truncation; 1 is between them. None for all.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import math, numpy as np
        >>> from agents.rollout.importance import Correction
        >>> Correction(2.0).weights(np.log([0.6, 0.1]), np.log([0.2, 0.2]), np.array([0, 0])).round(3).tolist()
        [2.0, 0.5]
        >>> Correction(math.inf, band=(0.6, 5.0)).weights(np.log([0.6, 0.1]), np.log([0.2, 0.2]), np.array([0, 0]))
        array([3., 0.], dtype=float32)
    """

    truncation: float = 2.0
    per: Per = "token"
    band: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.truncation >= 1:
            raise ValueError(f"Expected `truncation` of at least 1, got {self.truncation}.")
        if self.per not in get_args(Per):
            raise ValueError(f"Expected `per` to be one of {list(get_args(Per))}, got {self.per!r}.")
        if self.band is not None and not 0 <= self.band[0] <= 1 <= self.band[1]:
            raise ValueError(f"Expected `band` to be (low, high) with 0 <= low <= 1 <= high, got {self.band}.")

    def weights(self, log_probs: np.ndarray, behaviour_log_probs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the weight of each token, (N,) float32.

        Args:
            log_probs: The log-probabilities by the policy, (N,), in nats.
            behaviour_log_probs: The log-probabilities by the model that sampled, (N,), in nats.
            rows: The sequence that each token is in, (N,).
        """
        log_ratios = log_probs - behaviour_log_probs
        if self.per == "sequence":
            log_ratios = np.bincount(rows, weights=log_ratios)[rows]  # sums per sequence, (S,) -> (N,)
        # Bounded before `exp`, which could overflow for the sum over a long sequence.
        weights = np.exp(np.minimum(log_ratios, min(math.log(self.truncation), MOST_NATS))).astype(np.float32)
        if self.band is not None:
            low, high = (math.log(limit) if limit else -math.inf for limit in self.band)
            weights[(log_ratios < low) | (log_ratios > high)] = 0.0
        return weights


def effective_share(weights: np.ndarray) -> float:
    """Return the effective sample size of weights, (N,), as a share of N: (sum w)^2 / (N sum w^2), 0 to 1.

    A weighted mean has about the noise of a plain mean over this share of the tokens (Kish, 1965, section 11.7). It is
    1 for equal weights, k / N if k tokens have equal weights and the others 0, and 0 if all weights are 0.

    Args:
        weights: The weights, 0 or more.

    Example:
        >>> import numpy as np
        >>> effective_share(np.array([2.0, 2.0, 0.0, 0.0]))
        0.5
    """
    weights = weights.astype(np.float64)
    squares = len(weights) * float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0
