"""Tokenizers by name, so that an environment can be built from plain values such as those of a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from os import PathLike, fspath
from typing import cast

from textenv.huggingface.weights import check_name, from_pretrained
from textenv.text.demo_corpus import vocabulary
from textenv.text.tokenizer import Tokenizer

DEMO = "demo"
SPECIAL = ("</s>", "<unk>")  # ids 0 and 1: the end token, and the token of every unknown word


class WordTokenizer:
    """A tokenizer with one token per word, for texts whose words are separated by spaces.

    It gives the same ids as the tokenizer of the demo's model, without transformers.

    Args:
        words: The words, each once; the first has id 2, after the two special tokens.

    Example:
        >>> tokenizer = WordTokenizer(["good", "film"])
        >>> tokenizer.encode("good film"), tokenizer.decode([3, 2, 0], skip_special_tokens=True)
        ([2, 3], 'film good')
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIAL, *words]
        self.eos_token_id: int | None = 0
        self._ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        """Return the number of token ids, the two special ones included."""
        return len(self.words)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the id of each word, 1 for an unknown one; special tokens are never added."""
        return [self._ids.get(word, 1) for word in text.split()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the words, joined by spaces."""
        first = len(SPECIAL) if skip_special_tokens else 0
        return " ".join(self.words[i] for i in token_ids if i >= first)


def read_tokenizer(tokenizer: Tokenizer | str | PathLike[str]) -> Tokenizer:
    """Load a tokenizer: "demo", or a name, folder or GGUF file for transformers; a tokenizer is returned as is.

    Raises:
        ValueError: If no tokenizer has this name.

    Example:
        >>> read_tokenizer("demo").encode("this phone is great .")
        [101, 75, 51, 44, 3]
    """
    return _load(fspath(tokenizer)) if isinstance(tokenizer, (str, PathLike)) else tokenizer


@cache
def _load(name: str) -> Tokenizer:
    if name == DEMO:
        return WordTokenizer(vocabulary())
    from transformers import AutoTokenizer  # here, since `import textenv` loads gymnasium and numpy only

    check_name(name, f"{DEMO!r} or a tokenizer's name, folder or GGUF file")
    try:
        return cast("Tokenizer", from_pretrained(AutoTokenizer, name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected {DEMO!r} or a tokenizer's name, folder or GGUF file, got {name!r}: {reason}"
        ) from error
