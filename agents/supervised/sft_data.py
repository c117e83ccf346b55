"""The training rows of SFT: encoding, packing of several texts into a row, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from textenv.prompts.chat import Message, render_chat
from textenv.text.tokenizer import Tokenizer, encode_prompt

from ..small_models.training_loop import IGNORED

# A text, or a prompt and its reference; a prompt is a text or the messages of a chat.
Text: TypeAlias = str | tuple[str | Sequence[Message], str]


class Sample(NamedTuple):
    """The tokens of a text: the first `n_read` are only read, the others are also trained."""

    ids: list[int]
    n_read: int


Row: TypeAlias = list[Sample]  # one sample, or several packed ones


def encode_sample(tokenizer: Tokenizer, text: Text, end: int, max_tokens: int) -> list[Sample]:
    """Encode a text, or a prompt with its reference, closed by the end token.

    A prompt is encoded as an environment encodes it, a chat by the tokenizer's template. Prompt and reference are
    encoded together, since tokens may span their border, and the tokens after the prompt's are the reference's; if that
    changes the prompt's own tokens, the reference is encoded alone. A prompt that leaves no room for the reference
    loses its start, a reference that is too long by itself loses its end, and a text that is too long becomes several
    samples.

    Args:
        tokenizer: The tokenizer.
        text: A text, or a (prompt, reference) pair, whose prompt is a text or the messages of a chat.
        end: The end token's id.
        max_tokens: The most tokens of a sample.

    Raises:
        ValueError: If a prompt has no token, or is a chat that the tokenizer cannot render.
    """
    if isinstance(text, str):
        opening, body = encode_prompt(tokenizer, text)
        ids = [*opening, *body, end]
        pieces = [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]
        # The first token of a piece is only read: no token before it could predict it.
        return [Sample(piece, 1) for piece in pieces if len(piece) > 1]
    prompt, reference = text
    before = _encode(tokenizer, prompt)
    if not before:
        raise ValueError(
            f"Expected prompts of at least one token, got {prompt!r} with the reference {reference!r:.80}."
        )
    whole = _encode(tokenizer, prompt, reference)
    is_prefix = whole[: len(before)] == before
    after = whole[len(before) :] if is_prefix else list(tokenizer.encode(reference, add_special_tokens=False))
    after = [*after, end][: max_tokens - 1]  # at least one token of the prompt is kept
    before = before[-(max_tokens - len(after)) :]
    return [Sample(before + after, len(before))]


def _encode(tokenizer: Tokenizer, prompt: str | Sequence[Message], reference: str = "") -> list[int]:
    if isinstance(prompt, str):
        opening, body = encode_prompt(tokenizer, prompt + reference)
        return opening + body
    # The template writes the opening tokens, as in `textenv.prompts.prompts.PromptReader`.
    rendered = render_chat(tokenizer, prompt) + reference
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def words_of(text: Text) -> str:
    """Return all characters of a text, or of a prompt with its reference, to make a tokenizer of."""
    if isinstance(text, str):
        return text
    prompt, reference = text
    return (prompt if isinstance(prompt, str) else "".join(str(message["content"]) for message in prompt)) + reference


def pack(samples: Sequence[Sample], max_tokens: int) -> list[Row]:
    """Pack samples into rows of at most `max_tokens` without cutting any (first-fit decreasing)."""
    rows: list[Row] = []
    room: np.ndarray = np.zeros(len(samples), dtype=np.int64)
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        fits = np.flatnonzero(room[: len(rows)] >= len(sample.ids))
        if len(fits) == 0:
            room[len(rows)] = max_tokens - len(sample.ids)
            rows.append([sample])
        else:
            rows[fits[0]].append(sample)
            room[fits[0]] -= len(sample.ids)
    return rows


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a batch for a causal model: tensors (B, T), padded on the right.

    `labels` are the trained tokens in their own columns, since the model shifts them itself. The samples of a packed
    row do not attend to each other: the positions of each start at 0, where transformers
    `masking_utils.find_packed_sequence_indices` begins another sequence.
    """
    width = max(sum(len(sample.ids) for sample in row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    is_real = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.ids)
            ids[number, start:end] = torch.tensor(sample.ids)
            labels[number, start + sample.n_read : end] = ids[number, start + sample.n_read : end]
            positions[number, start:end] = torch.arange(end - start)
            start = end
        is_real[number, :start] = 1
        positions[number, start:] = torch.arange(width - start)  # padding becomes a sequence of its own
    batch = {"input_ids": ids, "labels": labels}
    # transformers looks for packed sequences only in a batch without an attention mask.
    is_packed = any(len(row) > 1 for row in rows)
    return batch | ({"position_ids": positions} if is_packed else {"attention_mask": is_real})
