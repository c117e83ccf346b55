"""Advantages of whole episodes from the returns of their group, without a critic; and of those that came in parts."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from .distributed import moments
from .transitions import Transitions
from .world import world

Advantage = Literal["gae", "grpo", "grpo_mean", "rloo"]

SMALL = 1e-4  # keeps differences that are only noise from being blown up to deviations of one


def group_advantages(returns: np.ndarray, groups: np.ndarray, advantage: Advantage) -> np.ndarray:
    """Return each episode's advantage over the others that began at the same prompt.

    - "grpo": (r - mean) / (deviation + 1e-4), of the group, the deviation with n - 1 (Shao et al., 2024, DeepSeekMath,
      section 4.1.2);
    - "grpo_mean": r - mean, so that hard and easy prompts count alike (Liu et al., 2025, Dr. GRPO, section 3.2);
    - "rloo": r - mean of the others (Ahmadian et al., 2024, section 3.3): n / (n - 1) of that.

    In a group whose returns are all equal, or of one, all are exactly 0.

    Args:
        returns: The sum of rewards of each episode, (E,).
        groups: The number of its group, (E,), in any order.
        advantage: Which one.

    Returns:
        (E,) float32.

    Example:
        >>> group_advantages(np.array([1.0, 0.0, 0.0, 5.0]), np.array([7, 7, 7, 8]), "rloo").tolist()
        [1.0, -0.5, -0.5, 0.0]
    """
    advantages = np.zeros(len(returns))
    for group in np.unique(groups):
        here = np.flatnonzero(groups == group)
        if len(here) == 1:
            continue
        shifted = returns[here].astype(np.float64) - returns[here[0]]  # equal ones become zeros, without rounding
        centred = shifted - shifted.mean()
        if advantage == "grpo":
            centred /= centred.std(ddof=1) + SMALL
        elif advantage == "rloo":
            centred *= len(here) / (len(here) - 1)
        advantages[here] = centred
    return advantages.astype(np.float32)


def carry(part: Transitions, advantage: float, next_value: float, gamma: float, gae_lambda: float) -> None:
    """Compute a part's advantages and returns, in place, from those that follow it (generalized advantages)."""
    for i in reversed(range(len(part.rewards))):
        delta = part.rewards[i] + gamma * next_value - part.values[i]
        advantage = delta + gamma * gae_lambda * advantage
        part.advantages[i] = advantage
        next_value = part.values[i]
    part.returns[:] = part.advantages + part.values


def mean_and_deviation(advantages: np.ndarray) -> tuple[float | np.float32, float | np.float32]:
    """Return what advantages (N,) are normalised by, over those of all processes: their mean and deviation.

    They are 0 and 1 where there are fewer than two advantages.
    """
    if world() is None:
        n, mean, deviation = len(advantages), 0.0, 1.0
        if n > 1:  # in float32, as SB3 has it
            mean, deviation = advantages.mean(), advantages.std(ddof=1) + np.float32(1e-8)
        return mean, deviation
    n, mean, variance = moments("advantages", advantages)
    return (np.float32(mean), np.float32(math.sqrt(variance * n / (n - 1)) + 1e-8)) if n > 1 else (0.0, 1.0)
