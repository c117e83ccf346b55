"""Training data of reward models: rankings of texts by preference, and texts with a score each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from textenv.prompts.dialogues import split_pair
from textenv.text.tokenizer import Tokenizer, encode_prompt


class Ranking(NamedTuple):
    """Answers to one prompt, the best first; a ranking of two is a pair of chosen and rejected.

    Args:
        texts: The answers, each as a continuation of the prompt.
        prompt: The text that all answers continue. A reward model scores `prompt + text`.
        margin: The difference to train between the scores of a better and a worse answer, in nats (Touvron et al.,
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
        """Return the indices of all pairs of texts, the better text first."""
        return list(itertools.combinations(range(len(self.texts)), 2))

    def wholes(self) -> list[str]:
        """Return each text with the prompt in front."""
        return [self.prompt + text for text in self.texts]


class Labelled(NamedTuple):
    """A text, prompt included, and the score that a reward model should give it."""

    text: str
    label: float


def hh_pairs(rows: Sequence[Mapping[str, str]]) -> list[Ranking]:
    r"""Read pairs of dialogues in the format of Anthropic's hh-rlhf, each as a prompt and its two replies.

    Args:
        rows: Mappings with "chosen" and "rejected": turns that open with "\n\nHuman:" and "\n\nAssistant:".

    Returns:
        Rankings of two, whose prompt is the shared start of both dialogues, up to its last "\n\nAssistant:".

    Raises:
        ValueError: If the dialogues of a row share no "\n\nAssistant:"; the message names the row.

    Example:
        >>> from agents import hh_pairs
        >>> hh_pairs([{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}])
        [Ranking(texts=(' Hello', ' Go'), prompt='\n\nHuman: Hi\n\nAssistant:', margin=0.0)]
    """
    pairs = [split_pair(row, f"row {number}") for number, row in enumerate(rows)]
    return [Ranking((pair.chosen, pair.rejected), pair.prompt) for pair in pairs]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Encode texts that are compared with each other, without an end token.

    If a text is longer than `max_tokens`, all texts lose the same number of tokens of their common start, so that
    their first difference stays in one column; a text that is still too long loses more of its own start.

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
    # The number of tokens at the start that all texts share.
    n_shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*encoded, strict=False)))
    return [ids[min(excess, n_shared, len(ids) - 1) :][-max_tokens:] for ids in encoded]
