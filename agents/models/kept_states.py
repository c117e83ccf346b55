"""The keys and values of prompts that were read, kept for rows that begin with the same prompt later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

# Of one row, by layer: keys and values, (heads, T, size) each.
States: TypeAlias = Sequence[tuple[Tensor, Tensor]]


class _Kept(NamedTuple):
    n_tokens: int
    states: States


class KeptStates:
    """Keys and values by the tokens that they belong to, as many as a bound allows; the oldest go first.

    They are those of the weights that read the tokens: whoever keeps them drops them when the weights change.

    Example:
        >>> import torch
        >>> kept, states = KeptStates(), [(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))]
        >>> kept.add(b"abc", 3, states, most_tokens=5)
        >>> kept.add(b"def", 3, states, most_tokens=5)
        >>> b"abc" in kept, b"def" in kept
        (False, True)
    """

    def __init__(self) -> None:
        self._kept: dict[bytes, _Kept] = {}  # the oldest first
        self.n_tokens = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def take(self, key: bytes) -> States:
        """Return the states under a key, which thereby is the newest."""
        self._kept[key] = self._kept.pop(key)
        return self._kept[key].states

    def add(self, key: bytes, n_tokens: int, states: States, most_tokens: int) -> None:
        """Keep states of `n_tokens` under a new key, and forget the oldest until there are `most_tokens` at most.

        The new states stay, however many tokens they have.
        """
        self._kept[key] = _Kept(n_tokens, states)
        self.n_tokens += n_tokens
        while self.n_tokens > most_tokens and len(self._kept) > 1:
            oldest = next(iter(self._kept))
            self.n_tokens -= self._kept.pop(oldest).n_tokens
