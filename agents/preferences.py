"""What a reward model is trained on: texts ranked by preference, or texts with a number each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from textenv.dialogues import split_pair
from textenv.tokenizer import Tokenizer, encode_prompt


class Ranking(NamedTuple):
    """Answers to one prompt, the best first; two of them are a pair of chosen and rejected.

    Args:
        texts: The answers, as they go on from the prompt.
        prompt: What they share. A scored text is `prompt + text`.
        margin: By how much the score of a better one should exceed that of a worse one, at least (Touvron et al.,
            2023, "Llama 2", equation 2).

    Example:
        >>> from agents import Ranking
        >>> Ranking(("good", "fair", "bad"), prompt="It was ").pairs()
        [(0, 1), (0, 2), (1, 2)]
    """

    texts: Sequence[str]
    prompt: str = ""
    margin: float = 0.0

    def pairs(self) -> list[tuple[int, int]]:
        """Return the places of all pairs, the better text first."""
        return list(itertools.combinations(range(len(self.texts)), 2))

    def wholes(self) -> list[str]:
        """Return the texts with their prompt."""
        return [self.prompt + text for text in self.texts]


class Labelled(NamedTuple):
    """A text and the score that it should get."""

    text: str
    label: float


def hh_pairs(rows: Sequence[Mapping[str, str]]) -> list[Ranking]:
    r"""Read pairs of dialogues in the format of Anthropic's hh-rlhf, split behind the last turn's opening they share.

    Args:
        rows: Each with "chosen" and "rejected": turns that open with "\n\nHuman:" and "\n\nAssistant:".

    Returns:
        Pairs whose prompt ends in "\n\nAssistant:" and is fit to be a prompt of an environment.

    Raises:
        ValueError: If the dialogues of a row share no opening of an answer, naming the row.

    Example:
        >>> from agents import hh_pairs
        >>> hh_pairs([{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}])
        [Ranking(texts=(' Hello', ' Go'), prompt='\n\nHuman: Hi\n\nAssistant:', margin=0.0)]
    """
    pairs = [split_pair(row, f"row {number}") for number, row in enumerate(rows)]
    return [Ranking((pair.chosen, pair.rejected), pair.prompt) for pair in pairs]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Encode texts that are compared with each other; none is closed by an end token.

    Where one is longer than `max_tokens`, all lose as many tokens of the start that they share, so that it stays
    aligned; beyond that each loses its own.

    Raises:
        ValueError: If a text has no token.
    """
    encoded = []
    for text in texts:
        opening, body = encode_prompt(tokenizer, text)
        if not opening + body:
            raise ValueError(f"Expected texts of at least one token, got {text!r}.")
        encoded.append(opening + body)
    excess = max(0, max(map(len, encoded)) - max_tokens)
    n_shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*encoded, strict=False)))
    return [ids[min(excess, n_shared, len(ids) - 1) :][-max_tokens:] for ids in encoded]
