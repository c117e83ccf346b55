"""Keys and values of the tokens already read, a row each: used only where a row still begins with those tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .decoding import NewRow, StepLayout, column_groups, current_layout, laid_out, sort_into_groups
from .interface import RowCache
from .sequences import bucket_by_length

if TYPE_CHECKING:
    from .backbone import Backbone

GROWTH = 64  # columns by which a full buffer grows at least
COMPACT_FROM = 16  # masked columns on the left that are not worth a copy
NEW_TOKENS = (
    256  # of new rows that a step reads beside the others' newest; more are better read in a forward of their own
)


class ColumnLayer(DynamicLayer):
    """One layer's keys and values in a buffer with room to spare, written in place: (B, heads, columns, size)."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0
        self.buffers: list[Tensor] = []  # keys and values

    def allocate(self, n_rows: int, columns: int, keys: Tensor, values: Tensor) -> None:
        """Make sure of buffers for `n_rows` with at least `columns` columns, like the given keys and values."""
        capacity = self.buffers[0].shape[2] if self.buffers else 0
        if columns <= capacity:
            return
        capacity = max(columns, capacity + capacity // 2) + GROWTH
        old, self.buffers = self.buffers, []
        for template in (keys, values):
            self.buffers.append(template.new_zeros(n_rows, template.shape[1], capacity, template.shape[3]))
        for buffer, kept in zip(self.buffers, old, strict=False):
            buffer[:, :, : self.columns] = kept[:, :, : self.columns]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the newest columns, and the earlier ones of a step's new rows, and return all; called by the model."""
        end = self.columns + key_states.shape[2]
        layout = current_layout()
        n_rows = len(key_states) if layout is None else layout.n_rows
        self.allocate(n_rows, end, key_states, value_states)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.columns : end] = states[:n_rows]
            for place, tokens in () if layout is None else layout.new_rows:
                earlier = slice(self.columns - (tokens.stop - tokens.start), self.columns)
                buffer[place, :, earlier] = states[tokens, :, 0].transpose(0, 1)  # (heads, tokens, size)
        self.columns = end
        self.keys, self.values = self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.columns

    def move(self, old: Tensor, new: Tensor, n_columns: int) -> None:
        """Move the last `n_columns` columns of some rows to other rows."""
        last = slice(self.columns - n_columns, self.columns)
        for buffer in self.buffers:  # on the device of its layer
            buffer[new.to(buffer.device), :, last] = buffer[old.to(buffer.device), :, last]

    def place(self, rows: Tensor, n_rows: int, columns: int, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of some rows so that they end at column `columns`."""
        self.allocate(n_rows, columns, keys, values)
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[rows.to(buffer.device), :, columns - states.shape[2] : columns] = states.to(buffer.dtype)
        self.columns = columns

    def shift(self, offset: int) -> None:
        """Move all columns to the right (left, where negative, which forgets the first ones)."""
        if not self.buffers:
            return
        self.allocate(self.buffers[0].shape[0], self.columns + offset, *self.buffers)
        kept = slice(max(-offset, 0), self.columns)
        for buffer in self.buffers:
            buffer[:, :, max(offset, 0) : self.columns + offset] = buffer[:, :, kept].clone()
        self.columns += offset


class PrefixCache(RowCache):
    """Decodes one token a row, reusing the keys and values of the tokens before it; see `RowCache`.

    Rows are aligned on the right: all share the column that is written next, and what lies left of a row's first
    token is masked, which to the model is ordinary left padding. A row is decoded incrementally only where it is the
    row read before plus one token; any other row is read anew (its keys and values are computed on their own and
    copied in).

    Args:
        backbone: The model.
    """

    backbone: Backbone

    def drop(self) -> None:
        """Forget everything."""
        super().drop()
        self.layers = Cache(layer_class_to_replicate=ColumnLayer)
        self.columns = 0
        self.places = np.arange(0)  # of the rows in the layers' buffers

    def _read(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        lengths = lengths.clamp(min=1)
        # The one synchronisation with the device in a step.
        growth, counts = torch.stack([self.growth(ids, lengths), lengths]).tolist()
        if not any(growth):  # as when a rollout's last observations were valued, and the next one begins with them
            self._step_back()
            growth = [1] * len(growth)
        is_known = [tokens == 1 for tokens in growth]
        fresh = [row for row, (k, n) in enumerate(zip(is_known, counts, strict=True)) if not k and n > 1]
        if not any(is_known):
            self.drop()
        self._make_room(max(counts), max((counts[row] for row in fresh), default=1) - 1)
        n_tokens = np.array(counts)
        self._arrange(n_tokens, np.array(is_known))
        beside = fresh if self._reads_beside(fresh, counts, is_known) else []
        for bucket in bucket_by_length(n_tokens[[] if beside else fresh] - 1):
            similar = [fresh[i] for i in bucket]
            self._prefill(ids, lengths, similar, counts[similar[0]] - 1)
        result = self._step(ids, lengths, n_tokens, beside)
        self.columns += 1
        self.remember(ids, lengths)
        return result

    def _reads_beside(self, fresh: list[int], counts: list[int], is_known: list[bool]) -> bool:
        """Whether the prompts of new rows go through the step's own forward."""
        n_tokens = sum(counts[row] - 1 for row in fresh)
        return self.backbone.takes_new_rows and any(is_known) and 0 < n_tokens <= NEW_TOKENS

    def _step(self, ids: Tensor, lengths: Tensor, counts: np.ndarray, beside: list[int]) -> tuple[Tensor, Tensor]:
        """Read the last token of each row, in the order of their places, and all tokens of the rows `beside`."""
        rows, places = (torch.from_numpy(one).to(ids.device) for one in (np.argsort(self.places), self.places))
        lengths = lengths[rows]  # of the row in each place
        tokens = ids[rows, lengths - 1]  # (B,)
        columns = torch.arange(self.columns + 1, device=ids.device)
        mask = columns >= self.columns + 1 - lengths[:, None]  # (B, columns + 1)
        positions = lengths - 1
        new_rows, start = [], len(ids)
        for row in beside:
            end = start + int(counts[row]) - 1
            new_rows.append(NewRow(int(self.places[row]), slice(start, end)))
            tokens = torch.cat([tokens, ids[row, : end - start]])
            positions = torch.cat([positions, torch.arange(end - start, device=ids.device)])
            start = end
        mask = torch.cat([mask, mask.new_ones(start - len(ids), len(columns))])  # attention of new rows needs none
        groups = column_groups(self.places, counts, self.columns + 1)
        with laid_out(StepLayout(len(ids), groups, new_rows)):
            return self.backbone(tokens[:, None], places, places * 0, mask.long(), positions[:, None], self.layers)

    def _step_back(self) -> None:
        """Forget the newest column."""
        self.columns -= 1
        for layer in self._column_layers():
            layer.columns -= 1

    def _make_room(self, longest: int, n_prefill: int) -> None:
        """Drop columns on the left that no row needs; add some where a new prompt is longer than what is there."""
        unused = self.columns + 1 - longest
        if unused >= COMPACT_FROM and 4 * unused >= self.columns:
            self._shift(-unused)
        if n_prefill > self.columns:
            self._shift(n_prefill - self.columns)

    def _shift(self, offset: int) -> None:
        for layer in self._column_layers():
            layer.shift(offset)
        self.columns += offset

    def _arrange(self, counts: np.ndarray, is_known: np.ndarray) -> None:
        """Give each row its place among rows of similar length, and move what known rows have there."""
        if is_known.all():
            return
        if not is_known.any():
            self.places = np.arange(len(counts))
        places = sort_into_groups(self.places, counts)
        moved = is_known & (places != self.places)
        if moved.any():
            old, new = (torch.from_numpy(one[moved]).to(self.backbone.device) for one in (self.places, places))
            for layer in self._column_layers():
                layer.move(old, new, int(counts[moved].max()) - 1)
        self.places = places

    def _prefill(self, ids: Tensor, lengths: Tensor, similar: list[int], width: int) -> None:
        """Read all but the last token of some rows, left-padded to `width`, and copy keys and values in."""
        rows, places = (torch.tensor(one, device=ids.device) for one in (similar, self.places[similar]))
        source = torch.arange(width, device=ids.device) - (width - (lengths[rows, None] - 1))  # (R, width)
        positions = source.clamp(min=0)
        states = self.backbone.prefill(ids[rows].gather(1, positions), (source >= 0).long(), positions)
        self._place(places, len(ids), states)

    def _place(self, places: Tensor, n_rows: int, states: Cache) -> None:
        """Copy in the keys and values of the rows in some places, to end where the next column is written."""
        while len(self.layers.layers) < len(states.layers):
            self.layers.layers.append(ColumnLayer())
        for layer, state in zip(self._column_layers(), cast("list[DynamicLayer]", states.layers), strict=True):
            assert state.keys is not None and state.values is not None, "just computed"
            layer.place(places, n_rows, self.columns, state.keys, state.values)

    def _column_layers(self) -> list[ColumnLayer]:
        return cast("list[ColumnLayer]", self.layers.layers)
