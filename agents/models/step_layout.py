"""The layout of a decoding step: rows of similar length side by side, attention computed a group at a time.

Rows in one buffer, aligned on the right, are as wide as the longest of them, and attention of one query reads all of
it, masked or not. Where lanes are refilled as they end, about half of what is read is masked. So rows are kept in a few
groups by length, and attention is computed group by group. A new row also brings its prompt: those tokens go through
the same forward as the newest tokens of the other rows, as in continuous batching (Yu et al., 2022, "Orca", section
3.2: only attention has to know which row a token belongs to).
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

N_GROUPS = 4  # a call of attention each: with more, the calls cost more than the columns that they save
DISORDER = 1.2  # rows move once attention reads more than this times the columns that it would read in perfect order
GROUPS_PAY = 0.75  # groups are used only where they read at most this share of the columns of one group of all rows
NAME = "sdpa_by_row"  # under which transformers knows this attention


class Group(NamedTuple):
    """Rows in neighbouring slots, and how many columns, on the right, the longest of them has."""

    rows: slice
    n_columns: int


class NewRow(NamedTuple):
    """A row that is read from its first token on in this step."""

    slot: int  # its index in the cache's buffers
    tokens: slice  # where its tokens but the last are in the batch


class StepLayout(NamedTuple):
    """The layout of a batch (B + P, 1): the newest token of each of B rows, then the P earlier tokens of new rows."""

    n_rows: int  # B
    groups: Sequence[Group]  # of the B rows, in the order of their slots
    new_rows: Sequence[NewRow] = ()


# `ColumnLayer.update` and `_attend` run inside the model, whose arguments have no room for a layout.
_layout: ContextVar[StepLayout | None] = ContextVar("layout", default=None)


def current_layout() -> StepLayout | None:
    """Return the layout of the current decoding step; None outside one."""
    return _layout.get()


@contextmanager
def laid_out(layout: StepLayout) -> Iterator[None]:
    """Within it, the forwards of a model are a decoding step of this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def sort_into_groups(slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a slot for each row, (B,), such that the longest rows are in the first group, the next in the second, ...

    The slots are divided into `N_GROUPS` groups of neighbours. A row moves only if its length puts it into another
    group, and no row moves while attention reads at most `DISORDER` times the columns of perfect order.

    Args:
        slots: The slot of each row, a permutation, (B,).
        lengths: The tokens of each row, (B,).

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
    result[movers[np.argsort(target[movers], kind="stable")]] = free  # as many are free in a group as move there
    return result


def column_groups(slots: np.ndarray, lengths: np.ndarray, n_columns: int) -> tuple[Group, ...]:
    """Return the groups of a step, in the order of their slots; a single group where several would save little.

    Args:
        slots: The slot of each row, a permutation, (B,).
        lengths: The tokens of each row, the newest included, (B,).
        n_columns: The columns in use.

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


def attends_by_row(config: PreTrainedConfig) -> bool:
    """Return whether a model's attention can be computed by the layout: PyTorch's SDPA, over all earlier tokens.

    Attention with a sliding window or in chunks needs the mask that the model makes of whole rows.
    """
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return config._attn_implementation == "sdpa" and all(window is None for window in windows)


@contextmanager
def attention_by_row(config: PreTrainedConfig) -> Iterator[None]:
    """Within it, a model whose attention is PyTorch's `scaled_dot_product_attention` computes it by the step's layout.

    Outside a step, and for other implementations of attention, nothing changes.
    """
    if current_layout() is None or config._attn_implementation != "sdpa":
        yield
        return
    # Attention of transformers is looked up by this name in each forward, as in `modeling_gpt2.GPT2Attention.forward`.
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
    assert layout is not None, "its name is set only within a step"
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
    for slot, tokens in layout.new_rows:
        # The row's last column holds its newest token, which is among the B above; the earlier ones are before it.
        row, earlier = slice(slot, slot + 1), slice(-1 - (tokens.stop - tokens.start), -1)
        own = query[tokens].transpose(0, 2)  # (1, heads, tokens, size)
        # Without a mask, several queries attend causally (`is_causal` in `sdpa_attention_forward`).
        output = sdpa_attention_forward(module, own, key[row, :, earlier], value[row, :, earlier], None, **kwargs)[0]
        outputs.append(output.transpose(0, 1))  # (tokens, 1, heads, size)
    return torch.cat(outputs), None  # (B + P, 1, heads, size)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, `masking_utils.create_causal_mask` makes no mask
