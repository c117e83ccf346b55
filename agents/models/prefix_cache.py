"""The prefix cache: each row's keys and values, reused as long as the row begins with the tokens behind them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .buckets import bucket_by_length
from .interface import CachedModel, RowCache
from .step_layout import NewRow, StepLayout, column_groups, current_layout, laid_out, sort_into_groups

GROWTH = 64  # columns: the least by which a full buffer grows, so that short texts do not copy it token by token
COMPACT_FROM = 16  # the fewest unused columns on the left for which a copy of the buffer without them is worth it
# The most prompt tokens of new rows that a decoding step reads beside the newest tokens of the other rows. More tokens
# are read faster in a forward of their own.
NEW_TOKENS = 256


class ColumnLayer(DynamicLayer):
    """The keys and values of one layer, written in place into buffers (B, heads, columns, size) with room to spare.

    transformers' own `cache_utils.DynamicLayer` copies all keys and values at each token (`torch.cat`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0  # columns in use, from the left; the buffers have room for more
        self.buffers: list[Tensor] = []  # keys and values; empty until the first states show their shapes

    def allocate(self, n_rows: int, columns: int, keys: Tensor, values: Tensor) -> None:
        """Make or enlarge the buffers to `columns` columns of `n_rows` rows or more, shaped and typed as the states."""
        capacity = self.buffers[0].shape[2] if self.buffers else 0
        if columns <= capacity:
            return
        capacity = max(columns, capacity + capacity // 2) + GROWTH  # by half, so that all copies are O(columns)
        old, self.buffers = self.buffers, []
        for template in (keys, values):
            self.buffers.append(template.new_zeros(n_rows, template.shape[1], capacity, template.shape[3]))
        for buffer, kept in zip(self.buffers, old, strict=False):  # at first there are no old buffers
            buffer[:, :, : self.columns] = kept[:, :, : self.columns]
        self.is_initialized = True  # otherwise transformers takes the layer for empty

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of the newest tokens; return all keys and values, (B, heads, columns, size).

        Attention calls it through transformers' `cache_utils.Cache.update`, with states (B, heads, T, size); within a
        step, with (B + P, heads, 1, size): the newest token of each row, then the P earlier tokens of new rows.
        """
        end = self.columns + key_states.shape[2]
        layout = current_layout()
        n_rows = len(key_states) if layout is None else layout.n_rows
        self.allocate(n_rows, end, key_states, value_states)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.columns : end] = states[:n_rows]
            for slot, tokens in () if layout is None else layout.new_rows:
                earlier = slice(self.columns - (tokens.stop - tokens.start), self.columns)
                buffer[slot, :, earlier] = states[tokens, :, 0].transpose(0, 1)  # (heads, tokens, size)
        self.columns = end
        self.keys, self.values = self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of columns in use, from which transformers makes masks and positions."""
        return self.columns

    def move(self, old: Tensor, new: Tensor, n_columns: int) -> None:
        """Copy the last `n_columns` columns of the rows `old` into the rows `new`."""
        last = slice(self.columns - n_columns, self.columns)
        for buffer in self.buffers:  # a device map puts each layer's buffers on the layer's device
            buffer[new.to(buffer.device), :, last] = buffer[old.to(buffer.device), :, last]

    def place(self, rows: Tensor, n_rows: int, columns: int, keys: Tensor, values: Tensor) -> None:
        """Write the states (R, heads, T, size) of some rows, (R,), so that they end at column `columns`."""
        self.allocate(n_rows, columns, keys, values)
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[rows.to(buffer.device), :, columns - states.shape[2] : columns] = states.to(buffer.dtype)
        self.columns = columns

    def shift(self, offset: int) -> None:
        """Move all columns to the right, or to the left by a negative offset, which drops the first columns."""
        if not self.buffers:
            return
        self.allocate(self.buffers[0].shape[0], self.columns + offset, *self.buffers)
        kept = slice(max(-offset, 0), self.columns)
        for buffer in self.buffers:  # source and target may overlap, hence the clone
            buffer[:, :, max(offset, 0) : self.columns + offset] = buffer[:, :, kept].clone()
        self.columns += offset


class PrefixCache(RowCache):
    """Decodes one token per row from the keys and values of earlier tokens; see `RowCache` for the rows that qualify.

    Rows are aligned on the right: all rows write the same next column, and the columns left of a row's first token are
    masked, which to the model is left padding. A row that did not just grow by one token is a new row: its keys and
    values are computed from its first token on, in a separate forward (`_prefill`) or in the step's forward (`_step`).

    Each row has a slot, its index in the buffers. Rows of similar length have neighbouring slots, so that attention
    reads few masked columns; see `sort_into_groups`.

    Args:
        backbone: The language model.
    """

    backbone: CachedModel

    def drop(self) -> None:
        """Forget all rows."""
        super().drop()
        self.layers = Cache(layer_class_to_replicate=ColumnLayer)  # a layer is made when the model first writes to it
        self.columns = 0  # columns in use, in each layer
        self.slots = np.arange(0)  # (B,): the slot of each row

    def _read(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        lengths = lengths.clamp(min=1)
        # Stacked, (2, B), for a single synchronisation with the device in a step.
        growth, counts = torch.stack([self.growth(ids, lengths), lengths]).tolist()
        # No row has grown: SB3 `on_policy_algorithm.collect_rollouts` values a rollout's last observations, and the
        # next rollout acts on them again. The newest column is forgotten and read once more.
        if not any(growth):
            self._step_back()
            growth = [1] * len(growth)
        is_known = [tokens == 1 for tokens in growth]
        fresh = [row for row, (k, n) in enumerate(zip(is_known, counts, strict=True)) if not k and n > 1]
        if not any(is_known):
            self.drop()
        self._make_room(max(counts), max((counts[row] for row in fresh), default=1) - 1)
        n_tokens = np.array(counts)
        self._arrange(n_tokens, np.array(is_known))
        joining = fresh if self._can_join(fresh, counts, is_known) else []
        for bucket in bucket_by_length(n_tokens[[] if joining else fresh] - 1):
            similar = [fresh[i] for i in bucket]  # the longest is the first
            self._prefill(ids, lengths, similar, counts[similar[0]] - 1)
        result = self._step(ids, lengths, n_tokens, joining)
        self.columns += 1
        self.remember(ids, lengths)
        return result

    def _can_join(self, fresh: list[int], counts: list[int], is_known: list[bool]) -> bool:
        """Return whether new rows join the step's forward, beside the rows that grew by a token."""
        n_tokens = sum(counts[row] - 1 for row in fresh)
        return self.backbone.takes_new_rows and any(is_known) and 0 < n_tokens <= NEW_TOKENS

    def _step(self, ids: Tensor, lengths: Tensor, counts: np.ndarray, joining: list[int]) -> tuple[Tensor, Tensor]:
        """Read each row's last token, and the P earlier tokens of the `joining` rows, in one forward of (B + P, 1).

        The batch is in the order of slots; reading it at `slots` returns hidden states and logits in the order of rows.
        """
        rows, slots = (torch.from_numpy(array).to(ids.device) for array in (np.argsort(self.slots), self.slots))
        lengths = lengths[rows]  # (B,): of the row in each slot
        tokens = ids[rows, lengths - 1]  # (B,)
        columns = torch.arange(self.columns + 1, device=ids.device)
        mask = columns >= self.columns + 1 - lengths[:, None]  # (B, columns + 1)
        positions = lengths - 1
        new_rows, start = [], len(ids)
        for row in joining:
            end = start + int(counts[row]) - 1
            new_rows.append(NewRow(int(self.slots[row]), slice(start, end)))
            tokens = torch.cat([tokens, ids[row, : end - start]])  # in the end (B + P,), as are the positions
            positions = torch.cat([positions, torch.arange(end - start, device=ids.device)])
            start = end
        # (B + P, columns + 1): `step_layout._attend` ignores the mask of the P tokens, but the shapes must agree.
        mask = torch.cat([mask, mask.new_ones(start - len(ids), len(columns))])
        groups = column_groups(self.slots, counts, self.columns + 1)
        with laid_out(StepLayout(len(ids), groups, new_rows)):
            return self.backbone(tokens[:, None], slots, slots * 0, mask.long(), positions[:, None], self.layers)

    def _step_back(self) -> None:
        """Forget the newest column."""
        self.columns -= 1
        for layer in self._column_layers():
            layer.columns -= 1

    def _make_room(self, longest: int, n_prefill: int) -> None:
        """Drop columns on the left that no row needs; add columns if a new row is longer than the columns in use.

        Beside the newest token there are never more columns than the model has positions.

        Args:
            longest: The number of tokens of the longest row.
            n_prefill: The number of tokens of the longest new row, without its last one.
        """
        unused = self.columns + 1 - longest
        # GPT-Neo's mask and MPT's ALiBi are tables with as many columns as the model has positions.
        is_full = self.backbone.longest is not None and self.columns + 1 > self.backbone.longest
        is_worth_it = unused >= COMPACT_FROM and 4 * unused >= self.columns  # a quarter: less is not worth the copy
        if is_full or is_worth_it:
            self._shift(-unused)
        if n_prefill > self.columns:
            self._shift(n_prefill - self.columns)

    def _shift(self, offset: int) -> None:
        for layer in self._column_layers():
            layer.shift(offset)
        self.columns += offset

    def _arrange(self, counts: np.ndarray, is_known: np.ndarray) -> None:
        """Give each row a slot beside rows of similar length, and move the keys and values of known rows there."""
        if is_known.all():
            return
        if not is_known.any():
            self.slots = np.arange(len(counts))
        slots = sort_into_groups(self.slots, counts)
        moved = is_known & (slots != self.slots)
        if moved.any():
            old, new = (torch.from_numpy(array[moved]).to(self.backbone.device) for array in (self.slots, slots))
            for layer in self._column_layers():
                layer.move(old, new, int(counts[moved].max()) - 1)
        self.slots = slots

    def _prefill(self, ids: Tensor, lengths: Tensor, similar: list[int], width: int) -> None:
        """Read all but the last token of some rows, left-padded to `width`, and write their keys and values."""
        rows, slots = (torch.tensor(array, device=ids.device) for array in (similar, self.slots[similar]))
        # The index in its row of the token that each column holds; negative in padding.
        source = torch.arange(width, device=ids.device) - (width - (lengths[rows, None] - 1))  # (R, width)
        positions = source.clamp(min=0)
        tokens = ids[rows].gather(1, positions)  # (R, width)
        states = self.backbone.prefill(tokens, (source >= 0).long(), positions)
        self._write(slots, len(ids), states)

    def _write(self, slots: Tensor, n_rows: int, states: Cache) -> None:
        """Write the keys and values of some slots, (R,), so that they end where the next column begins."""
        while len(self.layers.layers) < len(states.layers):
            self.layers.layers.append(ColumnLayer())
        for layer, state in zip(self._column_layers(), cast("list[DynamicLayer]", states.layers), strict=True):
            assert state.keys is not None and state.values is not None, "just computed"
            layer.place(slots, n_rows, self.columns, state.keys, state.values)

    def _column_layers(self) -> list[ColumnLayer]:
        return cast("list[ColumnLayer]", self.layers.layers)
