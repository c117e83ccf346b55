"""Sets of allowed tokens, one a transition: each distinct set is kept once, as bits or as ids, whichever is smaller."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


class TokenSets:
    """Distinct sets of tokens; a transition keeps the number of its own.

    A set takes V / 8 bytes as bits or 4 bytes a token as ids; a mask that many transitions share is stored once. Set 0
    is the whole vocabulary.

    Args:
        vocab_size: V.

    Example:
        >>> import numpy as np
        >>> from agents.token_sets import TokenSets
        >>> sets = TokenSets(vocab_size=5)
        >>> numbers = sets.add(np.array([[1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [1, 1, 0, 0, 0]], dtype=bool))
        >>> numbers.tolist(), sets.dense(numbers[1:2]).astype(int).tolist()
        ([1, 2, 1], [[0, 0, 1, 0, 1]])
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.sets: list[np.ndarray] = []  # (V / 8,) uint8 of bits, or (n,) int32 of ids
        self._numbers: dict[bytes, int] = {}  # by digest: the bits themselves would be kept twice
        self.add(np.ones((1, vocab_size), dtype=bool))

    def add(self, allowed: np.ndarray) -> np.ndarray:
        """Keep the sets (B, V) bool; return their numbers, (B,) int32."""
        bits = np.packbits(allowed, axis=1)
        return np.array([self._number(row, whole) for row, whole in zip(bits, allowed, strict=True)], dtype=np.int32)

    def _number(self, bits: np.ndarray, allowed: np.ndarray) -> int:
        key = blake2b(bits.tobytes(), digest_size=16).digest()
        if key not in self._numbers:
            ids = np.flatnonzero(allowed).astype(np.int32)
            self._numbers[key] = len(self.sets)
            self.sets.append(ids if ids.nbytes < bits.nbytes else bits.copy())
        return self._numbers[key]

    def dense(self, numbers: np.ndarray) -> np.ndarray:
        """Return the sets with these numbers, (N, V) bool."""
        allowed = np.zeros((len(numbers), self.vocab_size), dtype=bool)
        for row, number in zip(allowed, numbers, strict=True):
            kept = self.sets[number]
            if kept.dtype == np.uint8:
                row[:] = np.unpackbits(kept, count=self.vocab_size)
            else:
                row[kept] = True
        return allowed

    def state_dict(self) -> dict[str, Tensor]:
        """Return all sets, for a checkpoint, as bits (n, V / 8)."""
        return {"bits": torch.as_tensor(np.packbits(self.dense(np.arange(len(self.sets))), axis=1))}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take the sets of `state_dict`, in place of those here."""
        self.sets, self._numbers = [], {}
        self.add(np.unpackbits(tensors["bits"].numpy(), axis=1, count=self.vocab_size).astype(bool))


@dataclass(frozen=True)
class AllowedTokens:
    """Which tokens each of N transitions was sampled from."""

    sets: TokenSets
    numbers: np.ndarray  # (N,)

    def __getitem__(self, places: slice | np.ndarray) -> AllowedTokens:
        """Return those of some transitions."""
        return AllowedTokens(self.sets, self.numbers[places])

    def dense(self, device: torch.device) -> Tensor:
        """Return them as (N, V) bool."""
        return torch.as_tensor(self.sets.dense(self.numbers), device=device)
