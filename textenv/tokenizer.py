"""What we ask of a tokenizer, how a prompt is encoded for a model to continue, and a character tokenizer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

# A character of UTF-8 has at most four bytes, hence at most four tokens: enough context to decode a boundary right.
BOUNDARY_TOKENS = 4
BROKEN = "\ufffd"  # what a decoder writes for the bytes of an unfinished character


@runtime_checkable
class Tokenizer(Protocol):
    """The members of a tokenizer that the library uses; every Hugging Face tokenizer has them.

    `len(tokenizer)` is the number of token ids, added tokens included: it is the size of the action space.
    """

    eos_token_id: int | None

    def __len__(self) -> int:
        """Return the number of token ids."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `token_ids`."""


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Encode `text` so that a causal model continues it: what opens a text is kept, what closes it is not.

    A tokenizer may put special tokens in front (BOS, [CLS]) and behind (EOS, [SEP]). The ones behind would end the
    prompt. A text that already begins with the opening tokens (as a chat template writes them) gets them once.

    Returns:
        The opening special tokens, and the tokens of the text itself.

    Raises:
        ValueError: If the tokens of the text cannot be told from the special ones.
    """
    body = list(tokenizer.encode(text, add_special_tokens=False))
    full = list(tokenizer.encode(text, add_special_tokens=True))
    for start in range(len(full) - len(body) + 1):
        if full[start : start + len(body)] == body:
            opening = full[:start]
            return opening, (body[start:] if opening == body[:start] else body)
    raise ValueError(
        f"Expected the tokenizer to put special tokens around a text only, but {text!r} encodes to {full} with and to "
        f"{body} without them. Give prompts as lists of token ids instead."
    )


def decode_continuation(
    tokenizer: Tokenizer, context: Sequence[int], token_ids: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """Return the text that `token_ids` add behind the tokens `context`, so that text before + this reads right.

    Decoding the ids alone would lose the space in front of the first word (SentencePiece, word tokenizers) and break a
    character whose bytes lie on both sides.
    """
    near = list(context)[-BOUNDARY_TOKENS:]
    before = tokenizer.decode(near, skip_special_tokens=skip_special_tokens)
    both = tokenizer.decode(near + list(token_ids), skip_special_tokens=skip_special_tokens)
    shared = len(before)
    while not both.startswith(before[:shared]):
        shared -= 1
    if not before[shared:].strip(BROKEN):  # the rest is at most a character that the ids go on with
        return both[shared:]
    return tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class CharTokenizer:
    """One token a character and an end token: for tests, first steps and work without a network.

    Token 0 is the end token; the characters follow in the order of `alphabet`.

    Args:
        alphabet: The characters, each once.
        eos_token: How the end token reads when special tokens are not skipped.

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
        """Return an id for each character; no special tokens are ever added.

        Raises:
            ValueError: If `text` has a character outside the alphabet.
        """
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise ValueError(f"Expected characters of {self.alphabet!r}, got {unknown} in {text!r}.")
        return [self._ids[char] for char in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of the ids; the end token reads as `eos_token` unless skipped."""
        end = "" if skip_special_tokens else self.eos_token
        return "".join(self.alphabet[i - 1] if i > 0 else end for i in token_ids)
