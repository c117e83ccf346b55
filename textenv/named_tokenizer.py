"""A tokenizer by its name, so that an environment can be made of plain values, as those of a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from os import PathLike, fspath
from typing import cast

from textenv.demo import vocabulary
from textenv.model_loading import check_name, from_pretrained
from textenv.tokenizer import Tokenizer

DEMO = "demo"
SPECIAL = ("</s>", "<unk>")  # the end token, and what a word that is not known becomes


class WordTokenizer:
    """One token a word, for texts whose words stand between spaces: that of the demo's model, without transformers.

    Args:
        words: The words, each once.

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
        """Return the number of token ids: the words and two special ones."""
        return len(self.words)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return an id for each word; no special tokens are ever added."""
        return [self._ids.get(word, 1) for word in text.split()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the words with spaces between."""
        first = len(SPECIAL) if skip_special_tokens else 0
        return " ".join(self.words[i] for i in token_ids if i >= first)


def read_tokenizer(tokenizer: Tokenizer | str | PathLike[str]) -> Tokenizer:
    """Return a tokenizer as it is, or load it: "demo", or a name or folder for transformers' `AutoTokenizer`.

    Raises:
        ValueError: If there is none of the name.

    Example:
        >>> read_tokenizer("demo").encode("this phone is great .")
        [101, 75, 51, 44, 3]
    """
    return _load(fspath(tokenizer)) if isinstance(tokenizer, (str, PathLike)) else tokenizer


@cache
def _load(name: str) -> Tokenizer:
    if name == DEMO:
        return WordTokenizer(vocabulary())
    from transformers import AutoTokenizer  # textenv itself does not need it

    check_name(name, f"{DEMO!r} or a tokenizer's name or folder")
    try:
        return cast("Tokenizer", from_pretrained(AutoTokenizer, name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected {DEMO!r} or a tokenizer's name or folder, got {name!r}: {reason}") from error
