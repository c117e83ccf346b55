"""Sequences laid out so that those with equal prompts share them: each prompt once, each completion behind it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .buckets import MAX_PADDING, MIN_BUCKET_TOKENS, bucket_by_length, n_padded

# The fewest tokens that sharing must save in a chunk, and the least share of its tokens: fewer are read in less time
# than a second forward and the copies of keys and values take.
MIN_SAVED, MIN_SHARE = 64, 0.05


class Prompts(NamedTuple):
    """The prompts of S sequences, (S,) each, on the host."""

    numbers: np.ndarray  # equal numbers for equal prompts
    n_prompt: np.ndarray  # the number of tokens of the prompt
    lengths: np.ndarray  # the number of tokens of the sequence

    def of(self, sequences: np.ndarray) -> Prompts:
        """Return the prompts of some sequences."""
        return Prompts(*(array[sequences] for array in self))


class Completions(NamedTuple):
    """The tokens after the prompts of s sequences, which one forward reads behind the prompts' keys and values."""

    ids: Tensor  # (s, C), padded on the right
    positions: Tensor  # (s, C): the position of each token in its sequence
    source: Tensor  # (s * W,): for each column before these tokens, its index among the G * P tokens of the prompts
    mask: Tensor | None  # (s, W + C): zero in the columns left of a shorter prompt; None if there are none


class SharedPrompts(NamedTuple):
    """The S sequences of a chunk with each of their G distinct prompts once."""

    prompts: Tensor  # (G, P), padded on the right with any tokens
    n_prompt: Tensor  # (G,): the number of tokens of each prompt
    completions: list[Completions]  # of the sequences that are longer than their prompts
    # (n,) each, of the prompts and of each of the completions: the tokens, counted row by row, at which states are read
    chosen: list[Tensor]
    order: Tensor  # (N,): the index of each transition's state among all that are chosen

    @property
    def n_read(self) -> int:
        """The number of tokens that are read, padding included."""
        return self.prompts.numel() + sum(part.ids.numel() for part in self.completions)


def prompt_chunks(prompts: Prompts, bound: int | None, columns: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return groups of sequences that share prompts, (s,) each, and all other sequences.

    Args:
        prompts: The prompts of all sequences.
        bound: The most tokens that a group may read, padding included; a single sequence may be longer.
        columns: The most columns of attention.
    """
    every = np.arange(len(prompts.lengths))
    counts = np.bincount(prompts.numbers, minlength=1)
    several = every[(counts[prompts.numbers] > 1) & (prompts.n_prompt > 0)]
    if len(several) == 0:
        return [], every
    groups = []
    for group in _walk(prompts, several, bound):
        own = prompts.of(group)
        is_first = np.unique(own.numbers, return_index=True)[1]
        n_shared = len(is_first) * int(own.n_prompt.max())
        n_shared += sum(len(part) * _longest(own, part) for part in _parts(own, columns))
        n_whole = n_padded(own.lengths, bound)
        if n_whole - n_shared >= max(MIN_SAVED, MIN_SHARE * n_whole):
            groups.append(group)
    return groups, np.setdiff1d(every, np.concatenate([every[:0], *groups]))


def _walk(prompts: Prompts, sequences: np.ndarray, bound: int | None) -> Iterator[np.ndarray]:
    """Yield sequences in groups with prompts of similar length, those with equal prompts side by side."""
    own = prompts.of(sequences)
    after = own.lengths - own.n_prompt
    order = np.lexsort((-after, own.numbers, -own.n_prompt))  # by the last key first
    start = 0
    while start < len(order):
        width = int(own.n_prompt[order[start]])
        n_prompts = n_real = longest = 0
        for end in range(start, len(order)):
            i = order[end]
            is_new = end == start or own.numbers[i] != own.numbers[order[end - 1]]
            n_prompts, n_real = n_prompts + is_new, n_real + is_new * int(own.n_prompt[i])
            longest = max(longest, int(after[i]))
            n_tokens = n_prompts * width + (end + 1 - start) * longest
            is_padded = n_prompts * width > MIN_BUCKET_TOKENS and n_real < (1 - MAX_PADDING) * n_prompts * width
            if end > start and ((bound is not None and n_tokens > bound) or (is_new and is_padded)):
                break
        else:
            end = len(order)
        yield sequences[order[start:end]]
        start = end


def _parts(prompts: Prompts, columns: int) -> Iterator[np.ndarray]:
    """Yield the sequences that are longer than their prompts, (s,), with completions of similar length.

    A part has no more than `columns` columns: those of its longest prompt and of its longest completion.
    """
    longer = np.flatnonzero(prompts.lengths > prompts.n_prompt)
    for bucket in bucket_by_length((prompts.lengths - prompts.n_prompt)[longer]):
        part = longer[bucket]
        while len(part):  # the longest completion is the first; `widest[i]` is the longest of the first i prompts
            widest = np.maximum.accumulate(prompts.n_prompt[part])
            n = max(1, int((widest + _longest(prompts, part) <= columns).sum()))
            yield part[:n]
            part = part[n:]


def _longest(prompts: Prompts, sequences: np.ndarray) -> int:
    """Return the number of tokens of the longest of some completions."""
    return int((prompts.lengths - prompts.n_prompt)[sequences].max())


def lay_out(ids: Tensor, prompts: Prompts, rows: np.ndarray, cols: np.ndarray, columns: int) -> SharedPrompts:
    """Lay out the sequences of a chunk.

    Args:
        ids: The sequences, (S, T), padded on the right.
        prompts: Their prompts.
        rows: The sequence of each transition, (N,).
        cols: The column after which each transition acted, (N,).
        columns: The most columns of attention.
    """
    first, prompt_of = np.unique(prompts.numbers, return_index=True, return_inverse=True)[1:]  # (G,), (S,)
    width = int(prompts.n_prompt.max())  # P
    in_prompt = prompt_of * width  # (S,): the index of the state at column 0 of each sequence
    after_prompt = np.zeros_like(in_prompt)  # (S,): the index of the state at the first column after its prompt
    starts, completions = [0, len(first) * width], []
    for part in _parts(prompts, columns):
        n_prompt, n_after = prompts.n_prompt[part, None], (prompts.lengths - prompts.n_prompt)[part, None]  # (s, 1)
        n_columns, n_tokens = int(n_prompt.max()), int(n_after.max())  # W, C
        token = np.arange(n_columns) - (n_columns - n_prompt)  # (s, W): the prompt's token there; negative where none
        mask = np.concatenate([token >= 0, np.ones((len(part), n_tokens), dtype=bool)], axis=1)  # (s, W + C)
        # Padding gets the last token's position: further positions may be beyond the model's.
        positions = n_prompt + np.minimum(np.arange(n_tokens), n_after - 1)  # (s, C)
        source = in_prompt[part, None] + np.maximum(token, 0)  # (s, W)
        on_device = [torch.as_tensor(array, device=ids.device) for array in (part, positions, source)]
        completions.append(
            Completions(
                ids[on_device[0][:, None], on_device[1]],
                on_device[1],
                on_device[2].flatten(),
                None if mask.all() else torch.as_tensor(mask, device=ids.device).long(),
            )
        )
        after_prompt[part] = starts[-1] + np.arange(len(part)) * n_tokens
        starts.append(starts[-1] + len(part) * n_tokens)
    beyond = cols - prompts.n_prompt[rows]  # (N,): negative in the prompt
    states = np.where(beyond < 0, in_prompt[rows] + cols, after_prompt[rows] + beyond)
    chosen = [np.flatnonzero((states >= start) & (states < end)) for start, end in pairwise(starts)]  # transitions
    indices = [states[here] - start for here, start in zip(chosen, starts, strict=False)]
    order = np.argsort(np.concatenate(chosen))
    return SharedPrompts(
        ids[torch.as_tensor(first, device=ids.device), :width],
        torch.as_tensor(prompts.n_prompt[first], device=ids.device),
        completions,
        [torch.as_tensor(index, device=ids.device) for index in indices],
        torch.as_tensor(order, device=ids.device),
    )
