"""Whole sequences with the places where the policy acted: what the update reads in one forward a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .observations import prompt_lengths, unpack_observations
from .token_sets import AllowedTokens

MIN_BUCKET_TOKENS = 512  # below this a forward of its own costs more than the padding it saves
MAX_PADDING = 0.25  # the share of padding at which a bucket of similar lengths is closed


def pad_sequences(sequences: list[np.ndarray], device: torch.device | str) -> tuple[Tensor, np.ndarray]:
    """Return sequences as one tensor, (S, T), padded on the right with 0, and their lengths, (S,), on the host."""
    lengths = np.array([len(tokens) for tokens in sequences])
    padded = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = tokens
    return torch.as_tensor(padded, device=device), lengths


class Chunk(NamedTuple):
    """A part of a batch that is read in one forward."""

    ids: Tensor  # (S, T), padded on the right
    rows: Tensor  # (N,) of the chunk
    cols: Tensor  # (N,)
    transitions: np.ndarray  # (N,) which transitions of the batch these are
    allowed: AllowedTokens | None = None  # of these transitions
    n_prompt: Tensor | None = None  # (S,) how many tokens of each sequence are the prompt's, where known


class SequenceBatch:
    """Sequences and the transitions in them; stands where Stable-Baselines3 passes `observations`.

    Algorithms hand it to the policy without looking inside. `batch[::2]` keeps every other transition (TRPO does so).

    Args:
        tokens: (S, T), padded on the right.
        lengths: How many tokens of each sequence are real, (S,), on the host.
        rows: Which sequence each transition is in, (N,), on the host.
        cols: The column after which it acted: its logits and value are read there, (N,), on the host.
        micro_batch_tokens: The most tokens, padding included, of one forward; None for no bound. With a bound the
            forwards are repeated in the backward, which halves the memory and changes nothing else.
        allowed: Which tokens each transition was sampled from; None where all were.
        n_prompt: How many tokens of each sequence are the prompt's, (S,), on the host; an encoder-decoder needs it.

    Attributes:
        share: The weight of a minibatch's losses where several processes train (see `SharedGradient`), else None.
        old_log_probs: The log-probabilities that its actions were sampled with, (N,), where there are several.
    """

    share: float | None = None
    old_log_probs: Tensor | None = None

    def __init__(
        self,
        tokens: Tensor,
        lengths: np.ndarray,
        rows: np.ndarray,
        cols: np.ndarray,
        micro_batch_tokens: int | None = None,
        allowed: AllowedTokens | None = None,
        n_prompt: np.ndarray | None = None,
    ) -> None:
        self.tokens = tokens
        self.lengths = lengths
        self.rows = rows
        self.cols = cols
        self.micro_batch_tokens = micro_batch_tokens
        self.allowed = allowed
        self.n_prompt = n_prompt

    @classmethod
    def from_observations(cls, observations: Tensor) -> SequenceBatch:
        """Return a batch with one transition an observation: how the stock buffer's samples are read."""
        ids, lengths = unpack_observations(observations)
        counts = lengths.cpu().numpy()
        rows, cols = np.arange(len(counts)), np.maximum(counts - 1, 0)
        n_prompt = prompt_lengths(observations).cpu().numpy()
        return cls(ids[:, : max(counts.max(), 1)], counts, rows, cols, n_prompt=n_prompt)

    def __len__(self) -> int:
        """Return the number of transitions."""
        return len(self.rows)

    def __getitem__(self, places: slice | np.ndarray) -> SequenceBatch:
        """Return a batch with some of the transitions."""
        allowed = None if self.allowed is None else self.allowed[places]
        rows, cols = self.rows[places], self.cols[places]
        return SequenceBatch(self.tokens, self.lengths, rows, cols, self.micro_batch_tokens, allowed, self.n_prompt)

    def of_sequences(self, sequences: np.ndarray) -> tuple[SequenceBatch, np.ndarray]:
        """Return a batch of some sequences, given in order, and the places of their transitions in this one."""
        places = np.flatnonzero(np.isin(self.rows, sequences))
        part, lengths = self[places], self.lengths[sequences]
        part.tokens = self.tokens[torch.as_tensor(sequences, device=self.tokens.device), : lengths.max()]
        part.lengths, part.rows = lengths, np.searchsorted(sequences, part.rows)
        part.n_prompt = None if self.n_prompt is None else self.n_prompt[sequences]
        return part, places

    def chunks(self, most_tokens: int | None = None) -> Iterator[Chunk]:
        """Yield the batch in parts of similar length, so that little padding is read.

        Args:
            most_tokens: The most tokens of a part, where that is fewer than `micro_batch_tokens`.
        """
        device = self.tokens.device
        bounds = [bound for bound in (self.micro_batch_tokens, most_tokens) if bound is not None]
        for sequences in bucket_by_length(self.lengths, min(bounds, default=None)):
            local = np.full(len(self.lengths), -1)
            local[sequences] = np.arange(len(sequences))
            transitions = np.flatnonzero(local[self.rows] >= 0)
            if len(transitions) == 0:
                continue
            width = int(self.lengths[sequences].max())
            yield Chunk(
                self.tokens[torch.as_tensor(sequences, device=device), :width],
                torch.as_tensor(local[self.rows[transitions]], device=device),
                torch.as_tensor(self.cols[transitions], device=device),
                transitions,
                None if self.allowed is None else self.allowed[transitions],
                None if self.n_prompt is None else torch.as_tensor(self.n_prompt[sequences], device=device),
            )


def bucket_by_length(lengths: np.ndarray, max_tokens: int | None = None) -> Iterator[np.ndarray]:
    """Yield the places of sequences in groups of similar length, the longest first.

    Args:
        lengths: Tokens of each sequence, (S,).
        max_tokens: The most tokens of a group, padding included; a longer sequence stands alone. None for no bound.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = max(int(lengths[order[start]]), 1)
        end, real = start, 0
        while end < len(order):
            padded = (end + 1 - start) * width
            real += int(lengths[order[end]])
            if end > start and max_tokens is not None and padded > max_tokens:
                break
            if padded > MIN_BUCKET_TOKENS and real < (1 - MAX_PADDING) * padded:
                break
            end += 1
        yield order[start:end]
        start = end
