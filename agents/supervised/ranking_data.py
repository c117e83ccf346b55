"""The encoding of rankings and labelled texts for the training of reward models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from textenv.rewards.text_reader import TextReader

from .preferences import Labelled, Ranking, different_pairs, encode_texts


class Example(NamedTuple):
    """An encoded ranking, or an encoded labelled text: a single list of ids, no pairs, and a label."""

    ids: list[list[int]]
    pairs: list[tuple[int, int]]
    margin: float = 0.0
    label: float | None = None


def encode_all(name: str, reader: TextReader, data: Sequence[Any]) -> list[Example]:
    """Encode all rankings or labelled texts; pairs of equal tokens are left out, with a warning.

    Args:
        name: The data as messages name them, "data" or "held_out".
        reader: The reader of the texts.
        data: The rankings, or the labelled texts.

    Raises:
        ValueError: If the data are of two kinds, a text has no token, or no pair is left.
    """
    check_data(name, data)
    examples = [_encode(reader, example) for example in data]
    if examples[0].label is not None:
        return examples
    pairs = different_pairs(name, data, [example.ids for example in examples], reader.max_length)
    return [example._replace(pairs=own) for example, own in zip(examples, pairs, strict=True) if own]


def _encode(reader: TextReader, example: Ranking | Labelled) -> Example:
    if isinstance(example, Labelled):
        return Example(encode_texts(reader, [example.text]), [], label=float(example.label))
    return Example(encode_texts(reader, example.wholes()), example.pairs(), example.margin)


def common_closing(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[int, ...]:
    r"""Return the special tokens with which all texts end, and the spaces or line ends behind them; often none.

    Texts that a chat template rendered beforehand end with those that it writes behind an answer ("<|im_end|>\n").
    """
    texts = {tuple(ids) for example in examples for ids in example.ids}
    if len(texts) < 2:  # a text alone does not show where it ends
        return ()
    columns = zip(*map(reversed, texts), strict=False)
    shared = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)]  # the last token first
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special = (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    n_spaces = sum(1 for _ in itertools.takewhile(lambda token: token not in special, shared))
    n_special = sum(1 for _ in itertools.takewhile(lambda token: token in special, shared[n_spaces:]))
    closing = shared[: n_spaces + n_special][::-1]
    has_words = str(tokenizer.decode(closing[n_special:])).strip()
    return () if n_special == 0 or has_words else tuple(closing)


def check_data(name: str, data: Sequence[Ranking] | Sequence[Labelled]) -> None:
    """Raise ValueError unless the data are rankings of at least two texts each, or labelled texts."""
    kinds = {type(example) for example in data}
    if kinds not in ({Ranking}, {Labelled}):
        raise ValueError(
            f"Expected `{name}` to hold Rankings or Labelled texts, of one kind and at least one, got "
            f"{sorted(kind.__name__ for kind in kinds) or 'none'}."
        )
    for number, example in enumerate(data):
        if isinstance(example, Ranking) and (isinstance(example.texts, str) or len(example.texts) < 2):
            raise ValueError(f"Expected rankings of at least two texts, got {example.texts!r:.80} in row {number}.")
    if name == "held_out" and kinds == {Labelled} and len({cast("Labelled", example).label for example in data}) < 2:
        raise ValueError("Expected held-out labels that differ, got one value: there is nothing to compare.")
