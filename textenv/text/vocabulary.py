"""The tokens of a tokenizer as bytes, with which masks match text."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from textenv.text.tokenizer import BROKEN, Tokenizer

T = TypeVar("T")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's tokens for single bytes ("byte fallback")


@runtime_checkable
class _NamesTokens(Protocol):
    """A tokenizer that has the string of each token, as every Hugging Face tokenizer does."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return the token's string."""


class Vocabulary:
    """The tokens of a tokenizer as bytes, with sets of tokens as packed bits, and the tokens that end a turn.

    A set of V tokens is a uint8 array of shape (W,) with one bit per token, lowest bit first; W is the number of
    bytes rounded up to whole words of 32 bits.

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
        """Pickle only the arguments: everything else can be recomputed, and matchers of llguidance do not pickle."""
        return Vocabulary, (self.tokenizer, self.stop_ids)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, which `make` computes the first time that the key is asked for."""
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
        """Pack the set of tokens whose flag is true, from (V,) bool to (W,) uint8."""
        bits = np.packbits(allowed, bitorder="little")  # (ceil(V / 8),)
        return np.pad(bits, (0, -len(bits) % 4))  # (W,): whole words of 32 bits

    @cached_property
    def everything(self) -> np.ndarray:
        """The set of all tokens, as packed bits."""
        return self.pack_flags(np.ones(self.size, dtype=bool))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each token adds to a text, its leading space included; empty for special tokens.

        The bytes of a token that is only part of a character are read from its string (byte-level BPE, SentencePiece's
        `<0x0A>`); if the tokenizer cannot name that string, the token counts as adding nothing.
        """
        decode = self.tokenizer.decode
        # Each token is decoded after a plain one (the anchor), since the first token of a text may lose its space.
        anchor = next((i for i in range(self.size) if _is_plain(decode([i], skip_special_tokens=True))), None)
        near = [] if anchor is None else [anchor]
        anchor_text = decode(near, skip_special_tokens=True)
        pieces = []
        for token in range(self.size):
            joined = decode([*near, token], skip_special_tokens=True)
            is_kept = joined.startswith(anchor_text)
            text = joined[len(anchor_text) :] if is_kept else decode([token], skip_special_tokens=True)
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
    """Return the byte that each character stands for in byte-level BPE.

    This is the inverse of `bytes_to_unicode` in transformers' `convert_slow_tokenizer.py`: printable bytes are written
    as themselves, and the others, in their order, as the characters from 256 on.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # "!" to "~", "¡" to "¬", "®" to "ÿ"
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
