"""The tokenizer protocol, the encoding of prompts, the decoding of continuations, and a character tokenizer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

# A UTF-8 character has at most four bytes, hence at most four tokens: enough context to decode a text's boundary.
BOUNDARY_TOKENS = 4
BROKEN = "\ufffd"  # the replacement character, which decoders write for the bytes of an unfinished character


@runtime_checkable
class Tokenizer(Protocol):
    """The members of a tokenizer that this library uses; every Hugging Face tokenizer has them.

    `len(tokenizer)` is the number of token ids, added tokens included, and the size of the action space.
    """

    eos_token_id: int | None

    def __len__(self) -> int:
        """Return the number of token ids."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `token_ids`."""


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Encode `text` for a causal model to continue: with the special tokens before it, without those after it.

    A tokenizer may add special tokens before a text (BOS, [CLS]) and after it (EOS, [SEP]); the latter would end the
    prompt. A text that already begins with its opening tokens, as texts from chat templates do, gets no second ones.

    Returns:
        The special tokens that open the text, and the tokens of the text itself.

    Raises:
        ValueError: If the tokens of the text cannot be told from the special ones.

    Example:
        >>> encode_prompt(CharTokenizer("ab"), "ab")
        ([], [1, 2])
    """
    opening, body, _ = special_tokens_around(tokenizer, text)
    return opening, (body[len(opening) :] if body[: len(opening)] == opening else body)


def special_tokens_around(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int], list[int]]:
    """Return the special tokens that the tokenizer puts in front of `text`, the text's own tokens, and those behind it.

    Raises:
        ValueError: If the tokens of the text cannot be told from the special ones.

    Example:
        >>> special_tokens_around(CharTokenizer("ab"), "ab")
        ([], [1, 2], [])
    """
    body = list(tokenizer.encode(text, add_special_tokens=False))
    full = list(tokenizer.encode(text, add_special_tokens=True))
    for start in range(len(full) - len(body) + 1):
        end = start + len(body)
        if full[start:end] == body:
            return full[:start], body, full[end:]
    raise ValueError(
        f"Expected the tokenizer to put special tokens around a text only, but {text!r} encodes to {full} with and to "
        f"{body} without them. Give prompts as lists of token ids; a model that scores texts needs another tokenizer."
    )


def decode_continuation(
    tokenizer: Tokenizer, context: Sequence[int], token_ids: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """Return the text that `token_ids` add to the text of `context`.

    Decoding the ids alone would lose the space before the first word (SentencePiece, word tokenizers) and break a
    character whose bytes are split between context and continuation.

    Example:
        >>> decode_continuation(CharTokenizer("ab"), [1, 2], [1, 0])
        'a'
    """
    near = list(context)[-BOUNDARY_TOKENS:]
    context_text = tokenizer.decode(near, skip_special_tokens=skip_special_tokens)
    whole_text = tokenizer.decode(near + list(token_ids), skip_special_tokens=skip_special_tokens)
    shared = len(context_text)
    while not whole_text.startswith(context_text[:shared]):
        shared -= 1
    if not context_text[shared:].strip(BROKEN):  # at most a broken character differs, which the new ids complete
        return whole_text[shared:]
    return tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class CharTokenizer:
    """A tokenizer with one token per character and an end token, for tests and first steps without a network.

    Token 0 is the end token; the characters follow in the order of `alphabet`.

    Args:
        alphabet: The characters, each once.
        eos_token: The text of the end token where special tokens are not skipped.

    Raises:
        ValueError: If the alphabet has a character twice.

    Example:
        >>> tokenizer = CharTokenizer("ab ")
        >>> tokenizer.encode("ab a"), tokenizer.decode([1, 2, 0], skip_special_tokens=True)
        ([1, 2, 3, 1], 'ab')
    """

    def __init__(self, alphabet: str = string.ascii_lowercase + " .,!?'", eos_token: str = "</s>") -> None:
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"Expected each character of `alphabet` once, got {alphabet!r}.")
        self.alphabet = alphabet
        self.eos_token = eos_token
        self.eos_token_id: int | None = 0
        self._ids = {char: i for i, char in enumerate(alphabet, start=1)}

    def __len__(self) -> int:
        """Return the number of token ids: the characters and the end token."""
        return len(self.alphabet) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the id of each character; special tokens are never added.

        Raises:
            ValueError: If `text` has a character outside the alphabet.
        """
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise ValueError(f"Expected characters of {self.alphabet!r}, got {unknown} in {text!r}.")
        return [self._ids[char] for char in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of the ids, in which the end token is written as `eos_token` unless it is skipped."""
        end = "" if skip_special_tokens else self.eos_token
        return "".join(self.alphabet[i - 1] if i > 0 else end for i in token_ids)
