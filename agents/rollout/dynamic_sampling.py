"""Dynamic sampling: groups of samples with equal scores are not trained, the others wait until they fill a batch."""

from __future__ import annotations

import numpy as np

from ..distributed.collectives import gather


class DynamicSampling:
    """Decides after which rollout the groups with a signal are trained (Yu et al., 2025, DAPO, section 3.2).

    Args:
        min_groups: The number of groups with a signal, in all processes together, that fill a batch; None trains the
            whole groups of each rollout, with and without a signal.
        max_rollouts: The number of rollouts after which the groups with a signal are trained, however few they are.

    Attributes:
        n_rollouts: The number of rollouts whose groups wait.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> dynamic = DynamicSampling(min_groups=4, max_rollouts=3)
        >>> [dynamic.is_full(n_groups) for n_groups in (2, 5, 0, 1, 1)]  # the third of three rollouts is the last
        [False, True, False, False, True]
    """

    def __init__(self, min_groups: int | None = None, max_rollouts: int = 10) -> None:
        if min_groups is not None and min_groups < 1:
            raise ValueError(f"Expected `min_groups` to be at least 1 or None, got {min_groups}.")
        if max_rollouts < 1:
            raise ValueError(f"Expected `max_rollouts` to be at least 1, got {max_rollouts}.")
        self.min_groups, self.max_rollouts, self.n_rollouts = min_groups, max_rollouts, 0

    def is_full(self, n_groups: int) -> bool:
        """Count a rollout, and return whether the groups so far are trained after it; all processes agree.

        Args:
            n_groups: The number of groups with a signal in this process, those that waited included.
        """
        assert self.min_groups is not None, "dynamic sampling is on"
        self.n_rollouts += 1
        n_all = sum(gather("groups with a signal", n_groups))
        is_full = n_all >= self.min_groups or self.n_rollouts >= self.max_rollouts
        if is_full:
            self.n_rollouts = 0
        return is_full


def with_signal(scores: np.ndarray, groups: np.ndarray) -> set[int]:
    """Return the groups whose scores are not all equal, so that some of their samples get an advantage.

    Args:
        scores: The sum of rewards of each episode that is compared, (E,).
        groups: The number of each episode's group, (E,).

    Example:
        >>> with_signal(np.array([1.0, 0.0, 1.0, 1.0, 5.0]), np.array([7, 7, 8, 8, 9]))
        {7}
    """
    numbers, of_episode = np.unique(groups, return_inverse=True)
    lowest, highest = np.full(len(numbers), np.inf), np.full(len(numbers), -np.inf)
    np.minimum.at(lowest, of_episode, scores)
    np.maximum.at(highest, of_episode, scores)
    return set(numbers[highest > lowest].tolist())
