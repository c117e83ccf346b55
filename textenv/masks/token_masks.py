"""Token masks: functions from the text so far to the tokens that are allowed next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from textenv.episodes.completion import Preds
from textenv.prompts.prompts import Prompt
from textenv.text.vocabulary import Vocabulary

Allowed = Callable[[Prompt, Preds], np.ndarray]  # the tokens allowed next, packed as `Vocabulary.pack` does


class MaskError(ValueError):
    """The error where no token is allowed; the message names the masks, the prompt and the text so far."""


class MaskFunction(Protocol):
    """A mask given as a function, which is called before each token with the first two arguments of `get_reward`."""

    def __call__(self, prompt: Prompt, preds: Preds) -> Sequence[int] | np.ndarray:
        """Return the ids of the tokens allowed next, or whether each token is allowed, (V,) bool."""


@runtime_checkable
class TokenMask(Protocol):
    """A mask with a function for each lane, which may remember how far it has read the text.

    The function must be able to recompute from its arguments whatever it remembers: a lane may begin a new episode, be
    copied, or be resumed from a checkpoint, and the function is not notified.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> class NoStart:  # the first token of a turn is not a stop id
        ...     def start(self, vocabulary):
        ...         stops = vocabulary.pack(vocabulary.stop_ids)
        ...         everything = vocabulary.everything
        ...         return lambda prompt, preds: everything if len(preds.turn_ids) else everything & ~stops
        >>> env = TextEnv(["b"], CharTokenizer("ab"), reward=lambda prompt, preds, done: 0.0, mask=NoStart())
        >>> _ = env.reset(seed=0)
        >>> env.action_masks()
        array([False,  True,  True])
    """

    def start(self, vocabulary: Vocabulary) -> Allowed:
        """Return the function of one lane: from prompt and preds to the tokens allowed next, (W,) uint8, packed.

        Args:
            vocabulary: The tokens.

        Raises:
            ValueError: If the mask does not fit the vocabulary.
        """


MaskLike = TokenMask | MaskFunction


@dataclass(frozen=True)
class BannedMask:
    """A mask that forbids tokens, and texts anywhere in a turn, across tokens and inside longer words as well.

    Args:
        ids: Token ids.
        texts: Texts, exactly as they would appear; `" cat"` with its space forbids words that begin with "cat".

    Raises:
        ValueError: If there is nothing to forbid, or a text is empty.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> mask = BannedMask(texts=["aa"])
        >>> env = TextEnv(["b"], CharTokenizer("ab"), reward=lambda prompt, preds, done: 0.0, mask=mask)
        >>> _ = env.reset(seed=0), env.step(1)
        >>> env.action_masks()
        array([ True, False,  True])
    """

    ids: Sequence[int] = ()
    texts: Sequence[str] = ()

    def __post_init__(self) -> None:
        texts = (self.texts,) if isinstance(self.texts, str) else tuple(self.texts)
        if not all(texts) or not (len(self.ids) or texts):
            raise ValueError(f"Expected ids or texts to ban, no text empty, got ids={self.ids}, texts={texts}.")
        # Tuples, so that the mask is hashable: it is a key of `Vocabulary.remember`.
        object.__setattr__(self, "ids", tuple(int(token) for token in self.ids))
        object.__setattr__(self, "texts", texts)

    def start(self, vocabulary: Vocabulary) -> Allowed:
        """Return the function of one lane."""
        ids = vocabulary.everything & ~vocabulary.pack(self.ids)
        texts = [text.encode() for text in self.texts]
        longest = max((len(text) for text in texts), default=1) - 1  # the most bytes of a text that the turn may end in

        def without_texts() -> np.ndarray:
            pieces = enumerate(vocabulary.pieces)
            return ids & ~vocabulary.pack(i for i, piece in pieces if any(text in piece for text in texts))

        def allowed(prompt: Prompt, preds: Preds) -> np.ndarray:
            if not texts:
                return ids
            bits = vocabulary.remember(self, without_texts)  # (W,): without tokens that hold a text themselves
            tail = _tail(vocabulary.pieces, preds.turn_ids, longest)
            for text in texts:  # where the turn ends in the first bytes of a text, the others may not follow
                for cut in range(1, len(text)):
                    if tail.endswith(text[:cut]):
                        bits = bits & ~_starting_with(vocabulary, text[cut:])
            return bits

        return allowed


def _tail(pieces: list[bytes], ids: np.ndarray, length: int) -> bytes:
    """Return at least the last `length` bytes that `ids` write, or all of them if there are fewer."""
    tail = b""
    for token in ids[::-1]:  # from the end: a turn may have thousands of tokens
        if len(tail) >= length:
            break
        tail = pieces[token] + tail
    return tail


def _starting_with(vocabulary: Vocabulary, start: bytes) -> np.ndarray:
    """Return the tokens whose bytes begin with `start`, packed."""

    def find() -> np.ndarray:
        return vocabulary.pack(i for i, piece in enumerate(vocabulary.pieces) if piece.startswith(start))

    return vocabulary.remember(start, find)


@dataclass(frozen=True)
class AllowedMask:
    """A mask that allows a fixed set of tokens, and the env's stop ids.

    Args:
        ids: Token ids.

    Example:
        >>> AllowedMask([1, 2]).ids
        (1, 2)
    """

    ids: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(token) for token in self.ids))

    def start(self, vocabulary: Vocabulary) -> Allowed:
        """Return the function of one lane."""
        bits = vocabulary.pack((*self.ids, *vocabulary.stop_ids))
        return lambda prompt, preds: bits


@dataclass(frozen=True)
class MinLengthMask:
    """A mask that forbids the env's stop ids until a turn has `n_tokens` tokens; the stop id itself does not count.

    It does not forbid `stop_strings`, since many sequences of tokens may write them.

    Args:
        n_tokens: The fewest tokens of a turn, without its stop id.

    Raises:
        ValueError: If `n_tokens` is below 1.

    Example:
        >>> MinLengthMask(3)
        MinLengthMask(n_tokens=3)
    """

    n_tokens: int

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise ValueError(f"Expected `n_tokens` to be at least 1, got {self.n_tokens}.")

    def start(self, vocabulary: Vocabulary) -> Allowed:
        """Return the function of one lane."""
        if not vocabulary.stop_ids:
            raise ValueError("Expected an env with `stop_ids` for MinLengthMask, which holds them back, got none.")
        no_stop = vocabulary.everything & ~vocabulary.pack(vocabulary.stop_ids)
        return lambda prompt, preds: no_stop if len(preds.turn_ids) < self.n_tokens else vocabulary.everything


@dataclass(frozen=True)
class _FunctionMask:
    """A mask of a user's function, whose result is checked and packed."""

    function: MaskFunction

    def start(self, vocabulary: Vocabulary) -> Allowed:
        return lambda prompt, preds: self._packed(self.function(prompt, preds), vocabulary)

    def _packed(self, allowed: Any, vocabulary: Vocabulary) -> np.ndarray:
        array = np.asarray(allowed)
        if array.dtype == bool and array.shape == (vocabulary.size,):
            return vocabulary.pack_flags(array)
        # an empty list is accepted, too: numpy gives it the dtype float64
        if array.ndim == 1 and (np.issubdtype(array.dtype, np.integer) or not len(array)):
            return vocabulary.pack(array)
        raise ValueError(
            f"Expected {self!r} to return token ids or a bool array of shape ({vocabulary.size},), got {array.dtype} "
            f"of shape {array.shape}."
        )


def read_masks(mask: MaskLike | Sequence[MaskLike] | None) -> tuple[TokenMask, ...]:
    """Return the argument of `TextEnv(mask=...)` as a tuple of masks.

    Raises:
        TypeError: If a mask is neither a mask nor a function.
    """
    if mask is None:
        return ()
    masks = tuple(mask) if isinstance(mask, Sequence) else (mask,)
    for item in masks:
        if isinstance(item, type) or not (isinstance(item, TokenMask) or callable(item)):
            raise TypeError(
                f"Expected `mask` to be a mask, a function (prompt, preds) or a list of them, got {item!r}."
            )
    return tuple(item if isinstance(item, TokenMask) else _FunctionMask(item) for item in masks)
