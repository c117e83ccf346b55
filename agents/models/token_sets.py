"""The allowed tokens of each transition: every distinct set is stored once, as bits or ids, whichever is smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class TokenSets:
    """A store of numbered, distinct sets of tokens; a transition keeps the number of its set.

    A set takes V / 8 bytes as bits, or 4 bytes per token as ids. Set 0 is the whole vocabulary.

    Args:
        vocab_size: V, the number of tokens.

    Example:
        >>> import numpy as np
        >>> from agents.models.token_sets import TokenSets
        >>> sets = TokenSets(vocab_size=5)
        >>> numbers = sets.add(np.array([[1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [1, 1, 0, 0, 0]], dtype=bool))
        >>> numbers.tolist(), sets.dense(numbers[1:2]).astype(int).tolist()
        ([1, 2, 1], [[0, 0, 1, 0, 1]])
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.sets: list[np.ndarray] = []  # by number: bits, (V / 8,) uint8, or ids, (n,) int32
        self._numbers: dict[bytes, int] = {}  # by the bytes of a set's array; the array is a view of this key
        self.add(np.ones((1, vocab_size), dtype=bool))

    def add(self, allowed: np.ndarray) -> np.ndarray:
        """Store the sets, (B, V) bool; return their numbers, (B,) int32."""
        bits = np.packbits(allowed, axis=1)  # (B, ceil(V / 8))
        return np.array([self._number(row, flags) for row, flags in zip(bits, allowed, strict=True)], dtype=np.int32)

    def _number(self, bits: np.ndarray, allowed: np.ndarray) -> int:
        is_small = 4 * np.count_nonzero(allowed) < bits.nbytes
        # A key of ids never equals a key of bits, since it is always shorter.
        key = np.flatnonzero(allowed).astype(np.int32).tobytes() if is_small else bits.tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.sets)
            self.sets.append(np.frombuffer(key, dtype=np.int32 if is_small else np.uint8))
        return self._numbers[key]

    def only(self, numbers: Sequence[np.ndarray]) -> TokenSets:
        """Return a store of the sets with these numbers alone, and write their new numbers into the arrays."""
        used, kept = _used(numbers), TokenSets(self.vocab_size)
        new_number = {int(number): i for i, number in enumerate(used)}
        kept.sets = [self.sets[number] for number in used]
        kept._numbers = {key: new_number[number] for key, number in self._numbers.items() if number in new_number}
        for array in numbers:
            array[:] = np.searchsorted(used, array)
        return kept

    def dense(self, numbers: np.ndarray) -> np.ndarray:
        """Return the sets with these numbers, (N, V) bool."""
        allowed = np.zeros((len(numbers), self.vocab_size), dtype=bool)
        for row, number in zip(allowed, numbers, strict=True):
            stored = self.sets[number]
            if stored.dtype == np.uint8:
                row[:] = np.unpackbits(stored, count=self.vocab_size)
            else:
                row[stored] = True
        return allowed

    def state_dict(self, numbers: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return the sets with these numbers, for a checkpoint: the numbers, (n,), and the sets as bits, (n, V / 8)."""
        used = _used(numbers)
        # One set at a time: all at once would be (n, V) bool.
        bits = [np.packbits(self.dense(used[i : i + 1]), axis=1) for i in range(len(used))]
        return {"numbers": torch.as_tensor(used), "bits": torch.as_tensor(np.concatenate(bits))}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Replace all sets by those of `state_dict`, under the same numbers."""
        self.sets, self._numbers = [], {}
        for number, bits in zip(tensors["numbers"].tolist(), tensors["bits"].numpy(), strict=True):
            self.sets += [np.zeros(0, dtype=np.int32)] * (number - len(self.sets))  # stand for numbers that are unused
            self._number(bits, np.unpackbits(bits, count=self.vocab_size).astype(bool))


def _used(numbers: Sequence[np.ndarray]) -> np.ndarray:
    """Return the distinct numbers in the arrays, ascending, with 0 always among them."""
    return np.unique(np.concatenate([np.zeros(1, dtype=np.int32), *numbers]))


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens that each of N transitions could sample."""

    sets: TokenSets
    numbers: np.ndarray  # (N,): the number of each transition's set

    def __getitem__(self, index: slice | np.ndarray) -> AllowedTokens:
        """Return the allowed tokens of some of the transitions."""
        return AllowedTokens(self.sets, self.numbers[index])

    def dense(self, device: torch.device) -> Tensor:
        """Return a mask, (N, V) bool, True where a token was allowed."""
        return torch.as_tensor(self.sets.dense(self.numbers), device=device)
