"""Batches of whole sequences with the positions at which the policy acted; one forward reads a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .buckets import bucket_by_length
from .observations import prompt_lengths, unpack_observations
from .prompt_layout import Prompts, SharedPrompts, lay_out, prompt_chunks
from .token_sets import AllowedTokens


def pad_sequences(sequences: list[np.ndarray], device: torch.device | str) -> tuple[Tensor, np.ndarray]:
    """Return sequences as one tensor, (S, T), padded on the right with 0, and their lengths, (S,), on the host."""
    lengths = np.array([len(tokens) for tokens in sequences])
    padded = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = tokens
    return torch.as_tensor(padded, device=device), lengths


# Returns another model's log-probabilities, (m, V), at some of a chunk's transitions.
PartReader: TypeAlias = Callable[[slice], Tensor]


class LossTerm(Protocol):
    """The interface of a term that the loss of a minibatch has beside PPO's own: see `KLTerm`."""

    def read(self, chunk: Chunk) -> PartReader | None:
        """Return the reader of another model at a chunk, whose divergence the term needs; None if it needs none."""

    def added_to(self, results: Sequence[Tensor], log_probs: Tensor) -> Tensor:
        """Return log-probabilities, (N,), whose backward pass also runs that of the term, given all results."""


class Chunk(NamedTuple):
    """Some sequences of a batch, which one forward reads, and the transitions in them."""

    ids: Tensor  # (S, T), padded on the right
    rows: Tensor  # (N,): the sequence of each transition, by its row in `ids`
    cols: Tensor  # (N,): the column after which each transition acted
    transitions: np.ndarray  # (N,): the index of each transition in the batch
    allowed: AllowedTokens | None = None  # the tokens that each transition could sample
    n_prompt: Tensor | None = None  # (S,): the number of prompt tokens of each sequence
    shared: SharedPrompts | None = None  # the same sequences with each distinct prompt once; None: read them whole
    term: LossTerm | None = None  # a term of the loss that needs another model's probabilities at these transitions

    @property
    def n_read(self) -> int:
        """The number of tokens that the chunk's forwards read, padding included."""
        return self.ids.numel() if self.shared is None else self.shared.n_read


def count_tokens(chunks: Iterable[Chunk]) -> tuple[int, int]:
    """Return how many tokens the forwards of chunks read, and how many they would read without shared prompts."""
    counts = [(chunk.n_read, chunk.ids.numel()) for chunk in chunks]
    return sum(n_read for n_read, _ in counts), sum(n for _, n in counts)


class SequenceBatch:
    """Sequences and the transitions in them, in place of `observations` in Stable-Baselines3's samples.

    SB3 `ppo.PPO.train` and `a2c.A2C.train` pass `rollout_data.observations` to `policy.evaluate_actions` without
    looking inside. sb3-contrib's TRPO slices it: `batch[::2]` keeps every other transition.

    Args:
        tokens: (S, T), padded on the right.
        lengths: The number of tokens of each sequence, without padding, (S,), on the host.
        rows: The sequence of each transition, (N,), on the host.
        cols: The column after which each transition acted, where its logits and value are read, (N,), on the host.
        micro_batch_tokens: The most tokens of one forward, padding included; None sets no bound. With a bound the
            backward repeats each forward: less memory, and the same gradient.
        allowed: The tokens that each transition could sample; None for all tokens.
        n_prompt: The number of prompt tokens of each sequence, (S,), on the host; an encoder-decoder needs it.
        prompts: The number of each sequence's prompt, (S,), on the host: equal where the first `n_prompt` tokens are
            equal (see `number_prompts`). None: no prompt is shared.

    Attributes:
        share: The weight of a minibatch's losses if several processes train (see `SharedGradient`), else None.
        old_log_probs: The log-probabilities with which the actions were sampled, (N,), in nats; set together with
            `share`.
        advantages: The advantages of the minibatch's loss, (N,), for a surrogate (see `Surrogate`); set together with
            `share`.
        stand_in: The values, log-probabilities and entropies, (N,) each, that `LMPolicy.evaluate_actions` returns
            without a forward, where there is nothing to train (see `idle_samples`), else None.
        term: A term of the loss besides those of the algorithm, else None.

    Example:
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> batch = SequenceBatch(tokens, np.array([3, 2]), rows=np.array([0, 0, 1]), cols=np.array([1, 2, 1]))
        >>> len(batch), [chunk.ids.shape for chunk in batch.chunks()]
        (3, [torch.Size([2, 3])])
    """

    share: float | None = None
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    stand_in: tuple[Tensor, Tensor, Tensor] | None = None
    term: LossTerm | None = None

    def __init__(
        self,
        tokens: Tensor,
        lengths: np.ndarray,
        rows: np.ndarray,
        cols: np.ndarray,
        micro_batch_tokens: int | None = None,
        allowed: AllowedTokens | None = None,
        n_prompt: np.ndarray | None = None,
        prompts: np.ndarray | None = None,
    ) -> None:
        self.tokens = tokens
        self.lengths = lengths
        self.rows = rows
        self.cols = cols
        self.micro_batch_tokens = micro_batch_tokens
        self.allowed = allowed
        self.n_prompt = n_prompt
        self.prompts = prompts

    @classmethod
    def of(cls, observations: Tensor | SequenceBatch) -> SequenceBatch:
        """Return a batch as it is, and observations, (B, L), as `from_observations` does."""
        return observations if isinstance(observations, SequenceBatch) else cls.from_observations(observations)

    @classmethod
    def from_observations(cls, observations: Tensor) -> SequenceBatch:
        """Return a batch of one transition for each observation, (B, L), for the samples of SB3's own buffer."""
        ids, lengths = unpack_observations(observations)
        counts = lengths.cpu().numpy()
        rows, cols = np.arange(len(counts)), np.maximum(counts - 1, 0)  # 0: an empty row is read, and nobody uses it
        n_prompt = prompt_lengths(observations).cpu().numpy()
        return cls(ids[:, : max(counts.max(), 1)], counts, rows, cols, n_prompt=n_prompt)

    def __len__(self) -> int:
        """Return the number of transitions."""
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray) -> SequenceBatch:
        """Return a batch of the same sequences with some of the transitions."""
        allowed = None if self.allowed is None else self.allowed[index]
        rows, cols = self.rows[index], self.cols[index]
        return SequenceBatch(
            self.tokens, self.lengths, rows, cols, self.micro_batch_tokens, allowed, self.n_prompt, self.prompts
        )

    def of_sequences(self, sequences: np.ndarray) -> tuple[SequenceBatch, np.ndarray]:
        """Return a smaller batch of some sequences, and the indices of their transitions in this one, (n,).

        Args:
            sequences: The indices of the sequences, (s,), in ascending order.
        """
        transitions = np.flatnonzero(np.isin(self.rows, sequences))
        batch, lengths = self[transitions], self.lengths[sequences]
        batch.tokens = self.tokens[torch.as_tensor(sequences, device=self.tokens.device), : lengths.max()]  # (s, t)
        batch.lengths, batch.rows = lengths, np.searchsorted(sequences, batch.rows)
        batch.n_prompt = None if self.n_prompt is None else self.n_prompt[sequences]
        batch.prompts = None if self.prompts is None else self.prompts[sequences]
        return batch, transitions

    def chunks(self, most_tokens: int | None = None, columns: int | None = None) -> Iterator[Chunk]:
        """Yield the batch in chunks of similar length, so that little padding is read.

        Args:
            most_tokens: A further bound on the tokens of a chunk, padding included; the smaller of the two holds.
            columns: The most columns that attention may have, if sequences with equal prompts may share them: where
                that reads fewer tokens, a chunk has them as `shared`. None: every sequence is read whole.
        """
        bounds = [bound for bound in (self.micro_batch_tokens, most_tokens) if bound is not None]
        bound, rest = min(bounds, default=None), np.arange(len(self.lengths))
        if columns is not None and self.prompts is not None and self.n_prompt is not None:
            prompts = Prompts(self.prompts, np.minimum(self.n_prompt, self.lengths), self.lengths)
            groups, rest = prompt_chunks(prompts, bound, columns)
            for group in groups:
                yield from self._chunk(group, prompts, columns)
        for bucket in bucket_by_length(self.lengths[rest], bound):
            yield from self._chunk(rest[bucket])

    def _chunk(
        self, sequences: np.ndarray, prompts: Prompts | None = None, columns: int | None = None
    ) -> Iterator[Chunk]:
        """Yield the chunk of some sequences, unless no transition is in them."""
        device = self.tokens.device
        row_in_chunk = np.full(len(self.lengths), -1)  # (S,): -1 where the sequence is in another chunk
        row_in_chunk[sequences] = np.arange(len(sequences))
        transitions = np.flatnonzero(row_in_chunk[self.rows] >= 0)
        if len(transitions) == 0:
            return
        rows, cols = row_in_chunk[self.rows[transitions]], self.cols[transitions]  # (N,) each
        ids = self.tokens[torch.as_tensor(sequences, device=device), : int(self.lengths[sequences].max())]
        shared = None
        if prompts is not None and columns is not None:
            shared = lay_out(ids, prompts.of(sequences), rows, cols, columns)
        yield Chunk(
            ids,
            torch.as_tensor(rows, device=device),
            torch.as_tensor(cols, device=device),
            transitions,
            None if self.allowed is None else self.allowed[transitions],
            None if self.n_prompt is None else torch.as_tensor(self.n_prompt[sequences], device=device),
            shared,
            self.term,
        )


def number_prompts(sequences: Sequence[np.ndarray], n_prompt: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return a number for the prompt of each sequence, (S,): equal numbers for equal prompts.

    Args:
        sequences: The tokens of each sequence, of one type.
        n_prompt: The number of prompt tokens of each sequence, (S,).

    Example:
        >>> number_prompts([np.array([1, 2, 3]), np.array([1, 2]), np.array([1])], [2, 2, 1])
        array([0, 0, 1])
    """
    numbers: dict[bytes, int] = {}
    pairs = zip(sequences, n_prompt, strict=True)
    return np.array([numbers.setdefault(tokens[:n].tobytes(), len(numbers)) for tokens, n in pairs], dtype=np.int64)
