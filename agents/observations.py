"""The observations of `TextEnv` as tensors, and the observation that ends a truncated episode."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from textenv.episode import SEPARATOR


def unpack_observations(observations: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of observations without the separator, and how many there are.

    Args:
        observations: (B, L): prompt, separator, the tokens since, padding; see `TextEnv`.

    Returns:
        Tokens (B, L - 1), padded on the right with 0, and lengths (B,).

    Raises:
        ValueError: If the observations are not integers.

    Example:
        >>> from textenv.episode import PADDING, SEPARATOR
        >>> ids, lengths = unpack_observations(torch.tensor([[5, 6, SEPARATOR, 7, PADDING]]))
        >>> ids.tolist(), lengths.tolist()
        ([[5, 6, 7, 0]], [3])
    """
    if observations.is_floating_point():
        raise ValueError(
            f"Expected observations of token ids, got {observations.dtype}: does a wrapper change them? VecNormalize "
            "needs norm_obs=False."
        )
    observations = observations.long()
    boundary = (observations == SEPARATOR).long().argmax(dim=1, keepdim=True)  # (B, 1)
    columns = torch.arange(observations.shape[1] - 1, device=observations.device)[None]  # (1, L - 1)
    ids = observations.gather(1, columns + (columns >= boundary).long())  # (B, L - 1): skips the separator's column
    return ids.clamp(min=0), (observations >= 0).sum(dim=1)  # separator and padding are negative


def prompt_lengths(observations: Tensor) -> Tensor:
    """Return how many tokens of each observation (B, L) are the prompt's, (B,): those before the separator."""
    return (observations == SEPARATOR).long().argmax(dim=1)


class TerminalObservation(np.ndarray):
    """The last observation of a truncated episode, (L,), with those of all episodes truncated in the same step.

    Stable-Baselines3's `on_policy_algorithm.collect_rollouts` asks for the value of one terminal observation at a time
    (`policy.predict_values`), to add it to a truncated episode's last reward. By its siblings a policy values all of
    them in one forward.

    Attributes:
        siblings: The terminal observations of that step, (K, L).
        place: Which of the siblings this one is.
    """

    siblings: np.ndarray
    place: int

    @classmethod
    def of_step(cls, observations: list[np.ndarray]) -> list[TerminalObservation]:
        """Return the terminal observations of one step, each with all of them as siblings."""
        siblings = np.stack(observations)  # (K, L)
        terminal = []
        for place, observation in enumerate(observations):
            row = observation.view(cls)
            row.siblings, row.place = siblings, place
            terminal.append(row)
        return terminal
