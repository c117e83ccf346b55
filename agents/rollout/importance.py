"""Truncated importance weights for tokens that were sampled from another distribution than the policy's."""

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

    Args:
        truncation: The largest weight, 1 or more; `math.inf` for no truncation.
        per: "token" or "sequence".

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from agents.rollout.importance import Correction
        >>> Correction(2.0).weights(np.log([0.6, 0.1]), np.log([0.2, 0.2]), np.array([0, 0])).round(3).tolist()
        [2.0, 0.5]
    """

    truncation: float = 2.0
    per: Per = "token"

    def __post_init__(self) -> None:
        if not self.truncation >= 1:
            raise ValueError(f"Expected `truncation` of at least 1, got {self.truncation}.")
        if self.per not in get_args(Per):
            raise ValueError(f"Expected `per` to be one of {list(get_args(Per))}, got {self.per!r}.")

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
        return np.exp(np.minimum(log_ratios, min(math.log(self.truncation), MOST_NATS))).astype(np.float32)
