"""The difference in log-probabilities that rounding alone makes."""

from __future__ import annotations

from .actor_critic import LMActorCritic

TOLERANCE = 1e-3  # nats: rounding of a log-probability in float32
TOLERANCE_16_BIT = 0.1  # nats: half of PPO's usual clip range


def tolerance(lm: LMActorCritic) -> float:
    """Return the largest difference in nats that rounding alone makes between two scores of the same token."""
    is_16_bit = lm.autocast is not None or any(weight.element_size() < 4 for weight in lm.backbone.parameters())
    return TOLERANCE_16_BIT if is_16_bit else TOLERANCE
