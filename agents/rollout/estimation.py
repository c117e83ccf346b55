"""The estimation of advantages and of a critic's targets, with a lambda for each, over several rollouts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .transitions import Transitions


class Estimation(NamedTuple):
    """The settings of generalized advantage estimation (Schulman et al., 2016, equation 16).

    Args:
        gamma: Discount factor.
        gae_lambda: The trade-off of the policy's advantages.
        critic_lambda: The trade-off of the critic's targets (VC-PPO; Yuan et al., 2025, "Decoupled-GAE").
        lambda_alpha: The alpha of a policy's trade-off that depends on the length of an episode (VAPO; Yue et al.,
            2025, "Length-Adaptive GAE"); None for `gae_lambda`.

    Example:
        >>> estimation = Estimation(gamma=1.0, gae_lambda=0.95, critic_lambda=1.0, lambda_alpha=0.05)
        >>> [round(estimation.policy_lambda(n), 3) for n in (10, 40, 1000)]
        [0.0, 0.5, 0.98]
    """

    gamma: float
    gae_lambda: float
    critic_lambda: float
    lambda_alpha: float | None = None

    @property
    def has_two_lambdas(self) -> bool:
        """Whether the critic's targets need an estimation of their own."""
        return self.critic_lambda != self.gae_lambda

    def policy_lambda(self, n_tokens: int) -> float:
        """Return the trade-off for an episode of `n_tokens`: 1 - 1 / (alpha n), and 0 where that is negative."""
        if self.lambda_alpha is None:
            return self.gae_lambda
        return max(1 - 1 / (self.lambda_alpha * n_tokens), 0.0)

    def carry(
        self, part: Transitions, advantage: float = 0.0, next_value: float = 0.0, next_target: float = 0.0
    ) -> None:
        """Recompute the advantages and returns of a part of an episode, in place, from the transition that follows it.

        SB3 `buffers.RolloutBuffer.compute_returns_and_advantage` cuts the estimation off at the end of a rollout, with
        the value of the last observation; here it continues into the next rollout, with both lambdas.

        Args:
            part: The transitions of the part, (n,) each.
            advantage: The advantage of the transition that follows the part; 0 at the end of the episode.
            next_value: The value of that transition; 0 at the end of the episode.
            next_target: The return of that transition; 0 at the end of the episode.
        """
        rewards = part.task_rewards - part.penalties
        part.advantages[:] = gae(rewards, part.values, self.gamma, self.gae_lambda, advantage, next_value)
        above = part.advantages
        if self.has_two_lambdas:
            after = next_target - next_value
            above = gae(rewards, part.values, self.gamma, self.critic_lambda, after, next_value)
        part.returns[:] = above + part.values

    def adapt(self, episode: Transitions) -> None:
        """Recompute the advantages of a whole episode by the trade-off for its length, in place, if it has one."""
        if self.lambda_alpha is not None:
            rewards, policy_lambda = episode.task_rewards - episode.penalties, self.policy_lambda(len(episode.actions))
            episode.advantages[:] = gae(rewards, episode.values, self.gamma, policy_lambda)


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    gamma: float,
    gae_lambda: float,
    advantage: float = 0.0,
    next_value: float = 0.0,
) -> np.ndarray:
    """Return the advantages of consecutive transitions (Schulman et al., 2016, equation 16), (n,).

    Args:
        rewards: The rewards minus the penalties, (n,).
        values: The values, (n,).
        gamma: Discount factor.
        gae_lambda: The trade-off.
        advantage: The advantage of the transition that follows; 0 at the end of the episode.
        next_value: The value of that transition; 0 at the end of the episode.

    Example:
        >>> gae(np.array([0.0, 1.0]), np.array([0.5, 0.25]), gamma=1.0, gae_lambda=0.5).tolist()
        [0.125, 0.75]
    """
    advantages = np.zeros_like(values)
    for i in reversed(range(len(rewards))):
        delta = rewards[i] + gamma * next_value - values[i]
        advantage = delta + gamma * gae_lambda * advantage
        advantages[i] = advantage
        next_value = values[i]
    return advantages
