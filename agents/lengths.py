"""Decoding rows of different lengths: similar ones lie side by side, and attend over no more columns than they have.

Rows that share a buffer aligned on the right are as wide as the longest of them, and attention of one query reads all
of it, masked or not. Where lanes are refilled as they end, about half of what is read is masked. So rows are kept in a
few groups by length, and attention is computed a group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

N_GROUPS = 4
WORTH = 0.75  # of the columns that attention would read in one go: with more than that left, groups do not pay
NAME = "sdpa_by_length"


class Group(NamedTuple):
    """Neighbouring rows, and how many columns on the right the longest of them has."""

    rows: slice
    n_columns: int


def sort_into_groups(places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return new places of rows in their buffer, (B,), such that the longest rows are in the first group, and so on.

    Places are divided into `N_GROUPS` stretches. A row moves only where it is in another group than its length says:
    when one row is replaced by a shorter one, at most one row of each group moves.

    Args:
        places: The place of each row, a permutation, (B,).
        lengths: The tokens of each row, (B,).

    Example:
        >>> sort_into_groups(np.arange(8), np.array([9, 9, 1, 7, 6, 5, 4, 3]))  # row 2 is a new one
        array([0, 1, 6, 3, 2, 5, 4, 7])
    """
    size = _group_size(len(places))
    ranks = np.empty_like(places)
    ranks[np.lexsort((places, -lengths))] = np.arange(len(places))
    target = ranks // size
    stays = places // size == target
    result = places.copy()
    free = np.setdiff1d(np.arange(len(places)), places[stays])
    movers = np.flatnonzero(~stays)
    result[movers[np.argsort(target[movers], kind="stable")]] = free  # as many are free in a group as move there
    return result


def column_groups(places: np.ndarray, lengths: np.ndarray, n_columns: int) -> tuple[Group, ...]:
    """Return the groups of a step, in the order of their rows; none where one read of `n_columns` costs about as much.

    Args:
        places: The place of each row, a permutation, (B,).
        lengths: The tokens of each row, the newest included, (B,).
        n_columns: The columns in use.
    """
    size = _group_size(len(places))
    by_place = np.empty_like(lengths)
    by_place[places] = lengths
    starts = range(0, len(places), size)
    groups = tuple(Group(slice(start, start + size), int(by_place[start : start + size].max())) for start in starts)
    n_read = sum(len(by_place[rows]) * columns for rows, columns in groups)
    return groups if n_read <= WORTH * len(places) * n_columns else ()


def _group_size(n_rows: int) -> int:
    return -(-n_rows // N_GROUPS)


_groups: ContextVar[Sequence[Group]] = ContextVar("groups", default=())


@contextmanager
def rows_in(groups: Sequence[Group]) -> Iterator[None]:
    """Within it, a step of one token a row has its rows in these groups."""
    token = _groups.set(groups)
    try:
        yield
    finally:
        _groups.reset(token)


@contextmanager
def attention_by_length(config: PreTrainedConfig) -> Iterator[None]:
    """Within it, a model that attends by PyTorch's `scaled_dot_product_attention` does so a group at a time.

    Nothing changes outside `rows_in`, nor for other implementations of attention.
    """
    if not _groups.get() or config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = [
        sdpa_attention_forward(
            module,
            query[rows],
            key[rows, :, -n:],
            value[rows, :, -n:],
            attention_mask[rows, :, :, -n:],
            **kwargs,
        )[0]
        for rows, n in _groups.get()
    ]
    return torch.cat(parts), None  # (B, 1, heads, size)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
