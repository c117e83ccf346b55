"""How the rows of one decoding step lie beside each other, and how attention reads them.

Rows that share a buffer aligned on the right are as wide as the longest of them, and attention of one query reads all
of it, masked or not. Where lanes are refilled as they end, about half of what is read is masked. So rows are kept in a
few groups by length, and attention is computed a group at a time. And a row that is new brings a prompt to be read:
its tokens go through the same forward as the newest tokens of the others, as continuous batching does it (Yu et al.,
2022, "Orca", section 3.2: only attention has to know which row a token belongs to).
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
DISORDER = 1.2  # times the columns of rows in perfect order: with more, rows are moved
WORTH = 0.75  # of the columns that attention would read in one go: with more than that, groups do not pay
NAME = "sdpa_by_row"


class Group(NamedTuple):
    """Neighbouring rows, and how many columns on the right the longest of them has."""

    rows: slice
    n_columns: int


class NewRow(NamedTuple):
    """A row that is new, and where in the batch, behind the rows of the step, its tokens but the last are."""

    place: int
    tokens: slice


class StepLayout(NamedTuple):
    """A batch of one token a row, (B + P, 1): the newest tokens of B rows, and P earlier ones of rows that are new."""

    n_rows: int
    groups: Sequence[Group]
    new_rows: Sequence[NewRow] = ()


_layout: ContextVar[StepLayout | None] = ContextVar("layout", default=None)


def current_layout() -> StepLayout | None:
    """Return the layout of the step that is being decoded, None outside one."""
    return _layout.get()


@contextmanager
def laid_out(layout: StepLayout) -> Iterator[None]:
    """Within it, what a model is given is a step of this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def sort_into_groups(places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the places of rows in their buffer, (B,), such that the longest rows are in the first group, and so on.

    Places are divided into `N_GROUPS` stretches. A row moves only where it is in another group than its length says,
    and none does while the columns to be read are no more than `DISORDER` times those of perfect order.

    Args:
        places: The place of each row, a permutation, (B,).
        lengths: The tokens of each row, (B,).

    Example:
        >>> sort_into_groups(np.arange(8), np.array([9, 1, 9, 1, 9, 1, 9, 1]))  # the long ones first
        array([0, 4, 1, 5, 2, 6, 3, 7])
    """
    size = _group_size(len(places))
    ranks = np.empty_like(places)
    ranks[np.lexsort((places, -lengths))] = np.arange(len(places))
    if _n_columns(places, lengths) <= DISORDER * _n_columns(ranks, lengths):
        return places
    target = ranks // size
    stays = places // size == target
    result = places.copy()
    free = np.setdiff1d(np.arange(len(places)), places[stays])
    movers = np.flatnonzero(~stays)
    result[movers[np.argsort(target[movers], kind="stable")]] = free  # as many are free in a group as move there
    return result


def column_groups(places: np.ndarray, lengths: np.ndarray, n_columns: int) -> tuple[Group, ...]:
    """Return the groups of a step, in the order of their places; one of all where that costs about as much.

    Args:
        places: The place of each row, a permutation, (B,).
        lengths: The tokens of each row, the newest included, (B,).
        n_columns: The columns in use.
    """
    groups = _groups(places, lengths)
    n_read = sum(n for _, n in groups)
    return groups if n_read <= WORTH * len(groups) * n_columns else (Group(slice(0, len(places)), n_columns),)


def _groups(places: np.ndarray, lengths: np.ndarray) -> tuple[Group, ...]:
    size = _group_size(len(places))
    by_place = np.empty_like(lengths)
    by_place[places] = lengths
    stretches = [slice(start, min(start + size, len(places))) for start in range(0, len(places), size)]
    return tuple(Group(rows, int(by_place[rows].max())) for rows in stretches)


def _n_columns(places: np.ndarray, lengths: np.ndarray) -> int:
    return sum(n for _, n in _groups(places, lengths))


def _group_size(n_rows: int) -> int:
    return -(-n_rows // N_GROUPS)


def attends_by_row(config: PreTrainedConfig) -> bool:
    """Whether attention of such a model is ours to compute in a step: PyTorch's own, over all earlier tokens."""
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return config._attn_implementation == "sdpa" and all(window is None for window in windows)


@contextmanager
def attention_by_row(config: PreTrainedConfig) -> Iterator[None]:
    """Within it, a model that attends by PyTorch's `scaled_dot_product_attention` does so by the step's layout.

    Nothing changes outside a step, nor for other implementations of attention.
    """
    if current_layout() is None or config._attn_implementation != "sdpa":
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
    """Attend from tokens (B + P, heads, 1, size) to the columns of B rows, as `sdpa_attention_forward` does."""
    layout = current_layout()
    assert layout is not None, "set within a step alone"
    if kwargs.get("position_bias") is not None:
        if layout.new_rows:
            raise NotImplementedError("a bias of positions belongs to rows, not to tokens")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = []
    for rows, n in layout.groups:
        mask = None if attention_mask is None else attention_mask[rows, :, :, -n:]
        parts.append(
            sdpa_attention_forward(module, query[rows], key[rows, :, -n:], value[rows, :, -n:], mask, **kwargs)[0]
        )
    for place, tokens in layout.new_rows:
        row, since = slice(place, place + 1), slice(-1 - (tokens.stop - tokens.start), -1)
        own = query[tokens].transpose(0, 2)  # (1, heads, tokens, size)
        output = sdpa_attention_forward(module, own, key[row, :, since], value[row, :, since], None, **kwargs)[0]
        parts.append(output.transpose(0, 1))  # (tokens, 1, heads, size)
    return torch.cat(parts), None  # (B + P, 1, heads, size)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
