"""The aggregation of the losses of tokens: their mean, a mean over sequences, or a sum over a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from ..distributed.collectives import gather

Aggregation: TypeAlias = Literal["token", "sequence", "constant"]


def check_aggregation(aggregation: Aggregation, length: int | None) -> None:
    """Check the arguments of a buffer.

    Raises:
        ValueError: If the aggregation is unknown, or "constant" without a length, or a length without "constant".
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"Expected `aggregation` to be one of {list(get_args(Aggregation))}, got {aggregation!r}.")
    if (aggregation == "constant") != (length is not None) or (length is not None and length < 1):
        raise ValueError(
            "Expected `aggregation_length`, the most tokens of an episode, with aggregation='constant' and with no "
            f"other, got {length} with {aggregation!r}: make_agent sets it."
        )


def token_factors(
    aggregation: Aggregation,
    length: int | None,
    counts: np.ndarray,
    minibatches: Sequence[tuple[np.ndarray, float | None]],
) -> list[np.ndarray | float]:
    """Return the factor of the advantage of each token, by which a mean over tokens becomes another aggregation.

    SB3 `ppo.PPO.train` takes the mean over the N tokens of a minibatch. For S sequences of n_i tokens it becomes

    - "token": the mean over tokens, with factor 1,
    - "sequence": the mean over sequences of each one's mean over tokens, with factor N / (S n_i),
    - "constant": the mean over sequences of each one's sum over tokens, divided by `length`: N / (S length).

    N and S count the minibatch in all processes, all of which must call this.

    Args:
        aggregation: The aggregation.
        length: The divisor of "constant", the same for all sequences.
        counts: The number of tokens of each sequence of this process, (S,).
        minibatches: The indices of each minibatch's sequences, and the weight of the minibatch in this process, as
            `deal` returns them: None in a single process, 0 where the process has no sequence of the minibatch.

    Returns:
        For each minibatch the factors of its tokens, (N,), or 1.0 for all.

    Example:
        >>> import numpy as np
        >>> from agents.rollout.aggregation import token_factors
        >>> factors = token_factors("sequence", None, np.array([1, 3]), [(np.array([1, 0]), None)])
        >>> factors[0].round(3).tolist()
        [0.667, 0.667, 0.667, 2.0]
    """
    if aggregation == "token":
        return [1.0] * len(minibatches)
    own = [(int(counts[group].sum()), len(group)) if share != 0 else (0, 0) for group, share in minibatches]
    totals = np.sum(gather("the sequences of minibatches", own), axis=0)  # (minibatches, 2), over processes
    factors: list[np.ndarray | float] = []
    for (group, _), (n_tokens, n_sequences) in zip(minibatches, totals, strict=True):
        divisors = counts[group] if aggregation == "sequence" else np.full(len(group), length)
        factors.append(np.repeat(n_tokens / (max(n_sequences, 1) * divisors), counts[group]))
    return factors
