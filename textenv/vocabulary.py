"""What each token of a tokenizer writes, in bytes: what masks match text with."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from textenv.tokenizer import BROKEN, Tokenizer

T = TypeVar("T")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback


@runtime_checkable
class _NamesTokens(Protocol):
    """A tokenizer that tells the string of a token, as every Hugging Face tokenizer does."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return the token's string."""


class Vocabulary:
    """The tokens of a tokenizer as bytes, sets of them as packed bits, and those that end a turn.

    A set of tokens is a uint8 array with one bit a token, lowest first, in whole words of 32.

    Args:
        tokenizer: The tokenizer.
        stop_ids: The ids that end a turn.

    Example:
        >>> from textenv import CharTokenizer
        >>> vocabulary = Vocabulary(CharTokenizer("ab"), stop_ids=[0])
        >>> vocabulary.pieces, vocabulary.pack([0, 2])[0]
        ([b'', b'a', b'b'], np.uint8(5))
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.size = len(tokenizer)
        self._remembered: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what can be computed again: some of it does not pickle."""
        return Vocabulary, (self.tokenizer, self.stop_ids)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returned the first time it was asked for under this key."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]

    def pack(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """Return a set of ids as packed bits, (W,) uint8.

        Raises:
            ValueError: If an id is outside the vocabulary.
        """
        chosen = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        outside = chosen[(chosen < 0) | (chosen >= self.size)]
        if len(outside):
            raise ValueError(f"Expected token ids in [0, {self.size}), got {outside[0]}.")
        allowed = np.zeros(self.size, dtype=bool)
        allowed[chosen] = True
        return self.pack_flags(allowed)

    def pack_flags(self, allowed: np.ndarray) -> np.ndarray:
        """Return what is said of each token, (V,) bool, as packed bits, (W,) uint8."""
        bits = np.packbits(allowed, bitorder="little")
        return np.pad(bits, (0, -len(bits) % 4))

    @cached_property
    def everything(self) -> np.ndarray:
        """All tokens, packed."""
        return self.pack_flags(np.ones(self.size, dtype=bool))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each token writes behind other text, its space included; none for special tokens.

        A token that is a piece of a character is read from its string (byte-level BPE, SentencePiece's `<0x0A>`); where
        the tokenizer does not tell it, such a token is taken to write nothing.
        """
        decode = self.tokenizer.decode
        anchor = next((i for i in range(self.size) if _is_plain(decode([i], skip_special_tokens=True))), None)
        near = [] if anchor is None else [anchor]
        before = decode(near, skip_special_tokens=True)
        pieces = []
        for token in range(self.size):
            both = decode([*near, token], skip_special_tokens=True)
            text = both[len(before) :] if both.startswith(before) else decode([token], skip_special_tokens=True)
            pieces.append(self._broken_piece(token) if BROKEN in text else text.encode())
        return pieces

    def _broken_piece(self, token: int) -> bytes:
        if not isinstance(self.tokenizer, _NamesTokens):
            return b""
        name = self.tokenizer.convert_ids_to_tokens(token)
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte:
            return bytes([int(byte[1], 16)])
        return bytes(_BYTES[char] for char in name) if all(char in _BYTES for char in name) else b""


def _is_plain(text: str) -> bool:
    return text.isalnum() and BROKEN not in text


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character stands for in byte-level BPE (GPT-2's `bytes_to_unicode`, inverted)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
