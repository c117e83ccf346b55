"""Advantages of episodes within their group, without a critic, and of episodes that span several rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..distributed.collectives import moments
from ..distributed.world import world
from .transitions import Transitions

Advantage = Literal["gae", "grpo", "grpo_mean", "rloo"]

SMALL = 1e-4  # keeps differences that are rounding or noise from becoming advantages of about 1


def group_advantages(returns: np.ndarray, groups: np.ndarray, advantage: Advantage) -> np.ndarray:
    """Return the advantage of each episode over the other episodes of its prompt.

    With the return r of an episode, and the mean and deviation over the n episodes of its group:

    - "grpo": (r - mean) / (deviation + 1e-4), where the deviation divides by n - 1 (Shao et al., 2024, DeepSeekMath,
      section 4.1.2);
    - "grpo_mean": r - mean, so that hard and easy prompts count alike (Liu et al., 2025, Dr. GRPO, section 3.2);
    - "rloo": r - the mean of the other episodes (Ahmadian et al., 2024, section 3.3), which is n / (n - 1) times
      "grpo_mean".

    In a group of one episode, or of equal returns, all advantages are exactly 0.

    Args:
        returns: The sum of rewards of each episode, without penalties, (E,).
        groups: The number of each episode's group, (E,), in any order.
        advantage: One of the three above.

    Returns:
        (E,) float32.

    Example:
        >>> group_advantages(np.array([1.0, 0.0, 0.0, 5.0]), np.array([7, 7, 7, 8]), "rloo").tolist()
        [1.0, -0.5, -0.5, 0.0]
    """
    advantages = np.zeros(len(returns))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)  # (n,)
        if len(members) == 1:
            continue
        shifted = returns[members].astype(np.float64) - returns[members[0]]  # makes equal returns exactly 0
        centred = shifted - shifted.mean()
        if advantage == "grpo":
            centred /= centred.std(ddof=1) + SMALL
        elif advantage == "rloo":
            centred *= len(members) / (len(members) - 1)
        advantages[members] = centred
    return advantages.astype(np.float32)


def penalty_advantages(penalties: Sequence[np.ndarray], groups: np.ndarray, advantage: Advantage) -> list[np.ndarray]:
    """Return what the penalties of an episode's tokens add to its advantages, one array for each episode.

    Let s be the sum of an episode's penalties from its token t to its end, 0 if it ends before t, and the mean that of
    s at the same t over the E episodes of the group. The advantage of token t then gets:

    - with "grpo" and "grpo_mean": mean - s;
    - with "rloo": the mean over the other episodes - s, which is E / (E - 1) times that.

    A token has no influence on penalties of earlier tokens, which are left out, or of other episodes, which are a
    baseline. So the expected gradient is that of the penalties of whole texts, and their weight beside the scores is
    set by the coefficient. It is not divided by a deviation, which would give penalties of any size the same weight.
    Penalties that are equal in all episodes of a group, such as those of equal texts, add exactly 0; so do those of an
    episode without others.

    Args:
        penalties: The penalties of each episode's tokens, (n,) for an episode of n tokens.
        groups: As in `group_advantages`.
        advantage: As in `group_advantages`.

    Returns:
        (n,) for each episode, float64.

    Example:
        >>> penalties = [np.array([0.1, 0.3]), np.array([0.2])]  # s is 0.4 and 0.2 at the first token
        >>> [added.round(2).tolist() for added in penalty_advantages(penalties, np.array([0, 0]), "grpo_mean")]
        [[-0.1, -0.15], [0.1]]
    """
    advantages = [np.zeros(len(own)) for own in penalties]
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group).tolist()  # (E,)
        to_come = np.zeros((len(members), max(len(penalties[i]) for i in members)))  # (E, T)
        for row, i in enumerate(members):
            to_come[row, : len(penalties[i])] = penalties[i].astype(np.float64)[::-1].cumsum()[::-1]
        shifted = to_come - to_come[0]  # makes equal penalties exactly 0
        below = shifted.mean(axis=0) - shifted
        if advantage == "rloo" and len(members) > 1:
            below *= len(members) / (len(members) - 1)
        for row, i in enumerate(members):
            advantages[i] = below[row, : len(penalties[i])]
    return advantages


def carry(part: Transitions, advantage: float, next_value: float, gamma: float, gae_lambda: float) -> None:
    """Recompute the advantages and returns of a part of an episode, in place, from the transition that follows it.

    SB3 `buffers.RolloutBuffer.compute_returns_and_advantage` cuts the estimation (Schulman et al., 2016, equation 16)
    off at the end of a rollout, with the value of the last observation; here it continues into the next rollout.

    Args:
        part: The transitions of the part, (n,) each.
        advantage: The advantage of the transition that follows the part; 0 at the end of the episode.
        next_value: The value of that transition; 0 at the end of the episode.
        gamma: Discount factor.
        gae_lambda: The trade-off of the estimation.
    """
    rewards = part.task_rewards - part.penalties
    for i in reversed(range(len(rewards))):
        delta = rewards[i] + gamma * next_value - part.values[i]
        advantage = delta + gamma * gae_lambda * advantage
        part.advantages[i] = advantage
        next_value = part.values[i]
    part.returns[:] = part.advantages + part.values


def mean_and_deviation(advantages: np.ndarray) -> tuple[float | np.float32, float | np.float32]:
    """Return the mean and the deviation by which to normalise advantages, (N,), over those of all processes.

    They are 0 and 1 if there are fewer than two advantages. As in SB3 `ppo.PPO.train`, the deviation divides by N - 1
    and has 1e-8 added.
    """
    if world() is None:
        n, mean, deviation = len(advantages), 0.0, 1.0
        if n > 1:  # in float32, as in SB3
            mean, deviation = advantages.mean(), advantages.std(ddof=1) + np.float32(1e-8)
        return mean, deviation
    n, mean, variance = moments("advantages", advantages)
    return (np.float32(mean), np.float32(math.sqrt(variance * n / (n - 1)) + 1e-8)) if n > 1 else (0.0, 1.0)
