"""Importance weights: tokens that another distribution sampled count as often as the policy would sample them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

MOST_NATS = 80.0  # of a weight that float32 holds

Per: TypeAlias = Literal["token", "sequence"]


@dataclass(frozen=True)
class Correction:
    """Truncated importance weights, min(pi / mu, truncation), of tokens that mu sampled and pi is trained on.

    Truncation bounds the variance and pulls towards mu (Ionides, 2008, "Truncated Importance Sampling"); for the gap
    between the engine that samples and the one that trains: Yao et al., 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training".

    - "token": each token's own ratio. For the states that mu visits and the advantages measured there, the mean of
      weighted gradients is the policy's; that mu visits other states, and goes on otherwise, stays. A ratio is as close
      to 1 as the distributions are, however long the text.
    - "sequence": the product of the ratios of a sequence, for all its tokens. Without truncation, and with whole
      episodes, the mean is the policy gradient itself. The product of T ratios spreads with T: for short texts.

    Args:
        truncation: The largest weight, 1 or more; `math.inf` for none.
        per: "token" or "sequence".

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from agents.importance import Correction
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
            log_probs: By the policy, (N,).
            behaviour_log_probs: By what sampled, (N,).
            rows: Which sequence each token is in, (N,).
        """
        log_ratios = log_probs - behaviour_log_probs
        if self.per == "sequence":
            log_ratios = np.bincount(rows, weights=log_ratios)[rows]
        # Bounded before the exponential, which a sum over a long sequence could overflow.
        return np.exp(np.minimum(log_ratios, min(math.log(self.truncation), MOST_NATS))).astype(np.float32)
