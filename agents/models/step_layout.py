"""The layout of a decoding step: rows of similar length side by side, attention computed one group at a time.

Rows in one buffer, aligned on the right, are as wide as the longest row, and the attention of one query reads the whole
width, masked or not. With lanes that are refilled as they end, about half of that is masked. So rows are kept in a few
groups by length, and attention is computed group by group. The tokens of a new row's prompt go through the same forward
as the newest tokens of the other rows, as in continuous batching (Yu et al., 2022, "Orca", section 3.2: only attention
has to know which row a token belongs to).
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

N_GROUPS = 4  # each group takes one call of attention: more calls cost more than the columns that they save
DISORDER = 1.2  # rows move once attention reads more columns than this factor times those of a perfect order
GROUPS_PAY = 0.75  # groups are used only if they read at most this share of the columns of one group of all rows
NAME = "sdpa_by_row"  # the name of this attention in transformers' registries


class Group(NamedTuple):
    """Rows in neighbouring slots, and the number of columns, on the right, of the longest of them."""

    rows: slice
    n_columns: int


class NewRow(NamedTuple):
    """A row that this step reads from its first token on, once for all new rows with the same tokens."""

    slots: Sequence[int]  # the indices in the cache's buffers of all new rows with these tokens
    tokens: slice  # the part of the batch that holds the row's tokens, except for the last one


class StepLayout(NamedTuple):
    """The layout of a batch (B + P, 1): the newest token of each of B rows, then the P earlier tokens of new rows."""

    n_rows: int  # B
    groups: Sequence[Group]  # the B rows, in the order of their slots
    new_rows: Sequence[NewRow] = ()


# `ColumnLayer.update` and `_attend` are called by the model, which has no argument to pass a layout through.
_layout: ContextVar[StepLayout | None] = ContextVar("layout", default=None)


def current_layout() -> StepLayout | None:
    """Return the layout of the current decoding step; None outside one."""
    return _layout.get()


@contextmanager
def laid_out(layout: StepLayout) -> Iterator[None]:
    """Run a model's forwards inside as decoding steps of this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def sort_into_groups(slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a slot for each row, (B,): the longest rows are in the first group, the next longest in the second, ...

    The slots are divided into `N_GROUPS` groups of neighbours. A row moves only if its length puts it into another
    group, and no row moves while attention reads at most `DISORDER` times the columns of perfect order.

    Args:
        slots: The slot of each row, a permutation, (B,).
        lengths: The number of tokens of each row, (B,).

    Example:
        >>> sort_into_groups(np.arange(8), np.array([9, 1, 9, 1, 9, 1, 9, 1]))  # the long ones first
        array([0, 4, 1, 5, 2, 6, 3, 7])
    """
    size = _group_size(len(slots))
    ordered = np.empty_like(slots)  # the slot of each row in perfect order: the longest first
    ordered[np.lexsort((slots, -lengths))] = np.arange(len(slots))
    if _n_columns(slots, lengths) <= DISORDER * _n_columns(ordered, lengths):
        return slots
    target = ordered // size  # the group of each row in perfect order
    stays = slots // size == target
    result = slots.copy()
    free = np.setdiff1d(np.arange(len(slots)), slots[stays])  # ascending, so ordered by group
    movers = np.flatnonzero(~stays)
    # A group has as many free slots as rows move to it.
    result[movers[np.argsort(target[movers], kind="stable")]] = free
    return result


def column_groups(slots: np.ndarray, lengths: np.ndarray, n_columns: int) -> tuple[Group, ...]:
    """Return the groups of a step, in the order of their slots; a single group if several would save little.

    Args:
        slots: The slot of each row, a permutation, (B,).
        lengths: The number of tokens of each row, the newest included, (B,).
        n_columns: The number of columns in use.

    Example:
        >>> column_groups(np.arange(4), np.array([20, 4, 4, 2]), n_columns=20)[:2]
        (Group(rows=slice(0, 1, None), n_columns=20), Group(rows=slice(1, 2, None), n_columns=4))
    """
    groups = _groups(slots, lengths)
    n_read = sum(n for _, n in groups)
    return groups if n_read <= GROUPS_PAY * len(groups) * n_columns else (Group(slice(0, len(slots)), n_columns),)


def _groups(slots: np.ndarray, lengths: np.ndarray) -> tuple[Group, ...]:
    size = _group_size(len(slots))
    by_slot = np.empty_like(lengths)
    by_slot[slots] = lengths
    neighbours = [slice(start, min(start + size, len(slots))) for start in range(0, len(slots), size)]
    return tuple(Group(rows, int(by_slot[rows].max())) for rows in neighbours)


def _n_columns(slots: np.ndarray, lengths: np.ndarray) -> int:
    """Return how many columns attention reads, with all groups of the same number of rows."""
    return sum(n for _, n in _groups(slots, lengths))


def _group_size(n_rows: int) -> int:
    return -(-n_rows // N_GROUPS)  # rounded up: the last group may be smaller


def can_join_rows(config: PreTrainedConfig) -> bool:
    """Return whether a new row's tokens may join a decoding step: attention is PyTorch's SDPA, over all earlier tokens.

    Attention with a sliding window or in chunks needs the mask that the model makes for whole rows.
    """
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return config._attn_implementation == "sdpa" and all(window is None for window in windows)


@contextmanager
def attention_by_row(config: PreTrainedConfig) -> Iterator[None]:
    """Have a model that attends by PyTorch's `scaled_dot_product_attention` follow the step's layout inside.

    Outside a step, and for other implementations of attention, nothing changes.
    """
    if current_layout() is None or config._attn_implementation != "sdpa":
        yield
        return
    # transformers looks its attention up by this name in each forward, for instance in
    # `modeling_gpt2.GPT2Attention.forward`.
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute the attention of a step: transformers' `sdpa_attention_forward`, group by group.

    Args:
        module: The attention module.
        query: (B + P, heads, 1, size): of the newest token of each row, then of the P earlier tokens of new rows.
        key: (B, heads, columns, size): of all columns of each row.
        value: As `key`.
        attention_mask: (B + P, 1, 1, columns) bool; only the first B are used.
        **kwargs: The other arguments of an attention function of transformers.

    Returns:
        (B + P, 1, heads, size), and None for the attention weights, as transformers' models expect.
    """
    layout = current_layout()
    assert layout is not None, "`attention_by_row` sets this attention only within a step"
    if kwargs.get("position_bias") is not None:  # MPT's ALiBi, T5's relative positions: (B, heads, 1, columns)
        if layout.new_rows:
            raise NotImplementedError("a bias of positions belongs to rows, not to tokens")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for rows, n in layout.groups:
        mask = None if attention_mask is None else attention_mask[rows, :, :, -n:]
        outputs.append(
            sdpa_attention_forward(module, query[rows], key[rows, :, -n:], value[rows, :, -n:], mask, **kwargs)[0]
        )
    for slots, tokens in layout.new_rows:
        slot = slots[0]  # the others have the same keys and values
        # The row's last column holds its newest token, which is among the B above; its earlier tokens end before it.
        row, earlier = slice(slot, slot + 1), slice(-1 - (tokens.stop - tokens.start), -1)
        own = query[tokens].transpose(0, 2)  # (1, heads, tokens, size)
        # Without a mask, several queries attend causally (`is_causal` in `sdpa_attention_forward`).
        output = sdpa_attention_forward(module, own, key[row, :, earlier], value[row, :, earlier], None, **kwargs)[0]
        outputs.append(output.transpose(0, 1))  # (tokens, 1, heads, size)
    return torch.cat(outputs), None  # (B + P, 1, heads, size)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, `masking_utils.create_causal_mask` makes no mask
