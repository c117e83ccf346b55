"""The observations of `TextEnv` as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from textenv.episodes.rules import SEPARATOR


def unpack_observations(observations: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of observations without the separator, and the number of tokens of each.

    Args:
        observations: (B, L): prompt, separator, later tokens, padding; see `TextEnv`.

    Returns:
        Tokens (B, L - 1), padded on the right with 0, and lengths (B,).

    Raises:
        ValueError: If the observations are not integers.

    Example:
        >>> from textenv.episodes.rules import PADDING, SEPARATOR
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
    """Return the number of prompt tokens of each observation (B, L), (B,): those before the separator."""
    return (observations == SEPARATOR).long().argmax(dim=1)


def has_begun(observations: Tensor) -> Tensor:
    """Return whether each observation (B, L) has tokens behind its prompt, (B,) bool: otherwise an episode begins.

    Example:
        >>> from textenv.episodes.rules import PADDING, SEPARATOR
        >>> has_begun(torch.tensor([[5, SEPARATOR, 7], [5, SEPARATOR, PADDING]])).tolist()
        [True, False]
    """
    return (observations >= 0).sum(dim=1) > prompt_lengths(observations)
