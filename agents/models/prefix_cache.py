"""The prefix cache: each row's keys and values, reused as long as the row begins with the tokens behind them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .buckets import bucket_by_length
from .interface import CachedModel, LanguageModel, RowCache
from .kept_states import KeptStates, States
from .merged_adapters import merged_adapters, merging_forwards, tokens_to_merge
from .step_layout import NewRow, StepLayout, column_groups, current_layout, laid_out, sort_into_groups

GROWTH = 64  # columns: the least by which a full buffer grows, so that short texts do not copy it token by token
COMPACT_FROM = 16  # the fewest unused columns on the left for which a copy of the buffer without them is worth it
# The most prompt tokens of new rows that a decoding step reads beside the newest tokens of the other rows. More tokens
# are read faster in a forward of their own.
NEW_TOKENS = 256
# Prompts are kept with a quarter of the tokens that the rows themselves have room for. Samples of a group begin soon
# after each other: what was read long ago is hardly asked for again.
KEPT_SHARE = 4

Alike: TypeAlias = Sequence[int]  # new rows with the same tokens, except perhaps the last one


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
            for slots, tokens in () if layout is None else layout.new_rows:
                earlier = slice(self.columns - (tokens.stop - tokens.start), self.columns)
                for slot in slots:
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
        """Write the states (R, heads, T, size) of some rows, (R,), so that they end at column `columns`.

        States (1, heads, T, size) are those of all rows.
        """
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

    New rows with the same tokens are read once: those of one step, and those that begin later, until the weights
    change. Their keys and values are copied.

    Each row has a slot, its index in the buffers. Rows of similar length have neighbouring slots, so that attention
    reads few masked columns; see `sort_into_groups`.

    Args:
        backbone: The language model.

    Attributes:
        prefill_tokens: The number of tokens of new rows that the model has read, each row's last one excepted.
        shared_tokens: The number of such tokens whose keys and values were copied instead.
    """

    backbone: CachedModel
    is_sharing: ClassVar[bool] = True  # False only in tests and benchmarks, as the slow twin

    def __init__(self, backbone: LanguageModel) -> None:
        self.prefill_tokens = self.shared_tokens = 0
        self._forwards = merging_forwards(cast("nn.Module", backbone))
        self._tokens_to_merge = tokens_to_merge(self._forwards)
        super().__init__(backbone)

    def drop(self) -> None:
        """Forget all rows and prompts, and free the merged weights."""
        super().drop()
        self._n_read = 0  # tokens read from the same weights
        for forward in self._forwards:
            forward.release()
        self.kept = KeptStates()
        self._forget_rows()

    def read(self, *row: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `RowCache.read` does; once enough tokens are read from the same weights, adapters are merged.

        The count is the cache's own, so that what else is generated in between changes no bit of a rollout.
        """
        with merged_adapters(lambda: self._n_read >= self._tokens_to_merge):
            return super().read(*row)

    def _forget_rows(self) -> None:
        self.layers = Cache(layer_class_to_replicate=ColumnLayer)  # a layer is made when the model first writes to it
        self.columns = 0  # columns in use, in each layer
        self.slots = np.arange(0)  # (B,): the slot of each row

    def _begin_again(self) -> None:
        """Forget all rows, and also the prompts if the weights have changed or are others."""
        weights = tuple(self.backbone.parameters())
        is_same = len(weights) == len(self.weights) and all(a is b for a, b in zip(weights, self.weights, strict=True))
        if is_same and self.is_current():
            self._forget_rows()
        else:
            self.drop()

    def _read(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        lengths = lengths.clamp(min=1)
        # Stacked, (2, B), for a single synchronisation with the device in a step.
        growth, counts = torch.stack([self.growth(ids, lengths), lengths]).tolist()
        # SB3 `on_policy_algorithm.collect_rollouts` values a rollout's last observations, and without an update in
        # between the next rollout acts on them again. The newest column is then forgotten, and read once more.
        # A row of one token has nothing to read once more; an idle lane's stays as it is in every step.
        n_same, n_grown = (sum(g == k and n > 1 for g, n in zip(growth, counts, strict=True)) for k in (0, 1))
        if n_same > n_grown:
            self._step_back()
            growth = [tokens + 1 for tokens in growth]
        is_known = [tokens == 1 for tokens in growth]
        fresh = [row for row, (k, n) in enumerate(zip(is_known, counts, strict=True)) if not k and n > 1]
        if not any(is_known):
            self._begin_again()
        self._make_room(max(counts), max((counts[row] for row in fresh), default=1) - 1)
        n_tokens = np.array(counts)
        self._arrange(n_tokens, np.array(is_known))
        unread = self._copy_kept(fresh, texts(ids, fresh, n_tokens - 1), n_tokens - 1)
        joining = unread if self._can_join(list(unread.values()), counts, is_known) else {}
        self._prefill_all(ids, lengths, {} if joining else unread, n_tokens)
        result = self._step(ids, lengths, n_tokens, list(joining.values()))
        for key, rows in joining.items():
            n, slot = counts[rows[0]] - 1, slice(self.slots[rows[0]], self.slots[rows[0]] + 1)
            buffers = [(layer.buffers[0][slot], layer.buffers[1][slot]) for layer in self._column_layers()]
            self._keep(key, n, buffers, 0, self.columns)
        self.columns += 1
        self.remember(ids, lengths)
        return result

    def _copy_kept(self, fresh: list[int], texts: list[np.ndarray], n_tokens: np.ndarray) -> dict[bytes, list[int]]:
        """Write the keys and values of new rows whose tokens were read before; return the other new rows.

        Args:
            fresh: The new rows.
            texts: What tells their texts without the last token apart.
            n_tokens: The number of tokens of each row that are read or copied, (B,).

        Returns:
            Lists of rows that have their text in common, by this text.
        """
        self._n_read += len(n_tokens)  # each row's last token is read in any case
        alike: dict[bytes, list[int]] = defaultdict(list)
        for row, text in zip(fresh, texts, strict=True):
            key = text.tobytes() if self.is_sharing else bytes(row + 1)
            is_read = key not in alike and key not in self.kept
            self.prefill_tokens += is_read * int(n_tokens[row])
            self._n_read += is_read * int(n_tokens[row])
            self.shared_tokens += (not is_read) * int(n_tokens[row])
            alike[key].append(row)
        for key in [key for key in alike if key in self.kept]:
            self._write_kept(alike.pop(key), self.kept.take(key))
        return alike

    def _write_kept(self, rows: list[int], states: States) -> None:
        """Write the keys and values of one row, (heads, T, size), into several."""
        slots = torch.from_numpy(self.slots[rows])
        self._write(slots, len(self.slots), [(keys[None], values[None]) for keys, values in states])

    def _keep(self, key: bytes, n: int, states: States, row: int, end: int) -> None:
        """Keep the `n` tokens of a row that end before column `end` of states (R, heads, T, size) by layer."""
        if self.is_sharing:
            own = [tuple(part[row, :, end - n : end].clone() for part in layer) for layer in states]
            self.kept.add(key, n, cast("States", own), len(self.slots) * self._width() // KEPT_SHARE)

    def _width(self) -> int:
        """Return the number of columns that a row has in the buffers of its prompt."""
        return self.columns

    def _can_join(self, unread: Sequence[Alike], counts: list[int], is_known: list[bool]) -> bool:
        """Return whether new rows join the step's forward, beside the rows that grew by a token."""
        n_tokens = sum(counts[rows[0]] - 1 for rows in unread)
        return self.backbone.takes_new_rows and any(is_known) and 0 < n_tokens <= NEW_TOKENS

    def _step(self, ids: Tensor, lengths: Tensor, counts: np.ndarray, joining: list[Alike]) -> tuple[Tensor, Tensor]:
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
        for alike in joining:
            end = start + int(counts[alike[0]]) - 1
            new_rows.append(NewRow(self.slots[alike].tolist(), slice(start, end)))
            tokens = torch.cat([tokens, ids[alike[0], : end - start]])  # in the end (B + P,), as are the positions
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

    def _prefill_all(self, ids: Tensor, lengths: Tensor, unread: dict[bytes, list[int]], counts: np.ndarray) -> None:
        """Read new rows in batches of similar length, and keep their keys and values."""
        keys = list(unread)
        n_tokens = np.array([counts[unread[key][0]] - 1 for key in keys], dtype=np.int64)
        for bucket in bucket_by_length(n_tokens):
            width = int(n_tokens[bucket[0]])  # the longest is the first
            states = self._prefill(ids, lengths, [unread[keys[i]] for i in bucket], width)
            for row, i in enumerate(bucket):
                self._keep(keys[i], int(n_tokens[i]), states, row, width)

    def _prefill(self, ids: Tensor, lengths: Tensor, similar: list[Alike], width: int) -> States:
        """Read all but the last token of some rows, left-padded to `width`; write and return their keys and values."""
        rows = torch.tensor([alike[0] for alike in similar], device=ids.device)  # (R,)
        # The index in its row of the token that each column holds; negative in padding.
        source = torch.arange(width, device=ids.device) - (width - (lengths[rows, None] - 1))  # (R, width)
        positions = source.clamp(min=0)
        tokens = ids[rows].gather(1, positions)  # (R, width)
        states = by_layer(self.backbone.prefill(tokens, (source >= 0).long(), positions))
        slots = torch.from_numpy(self.slots[np.concatenate(similar)])
        self._write(slots, len(ids), states, copies_of(similar))
        return states

    def _write(self, slots: Tensor, n_rows: int, states: States, copies: Tensor | None = None) -> None:
        """Write the keys and values of some slots, (R,), so that they end where the next column begins.

        Args:
            slots: (R,).
            n_rows: The number of rows in the buffers.
            states: (R, heads, T, size) by layer, or (1, heads, T, size) for all slots.
            copies: The row of `states` that each slot gets, (R,); None for its own.
        """
        while len(self.layers.layers) < len(states):
            self.layers.layers.append(ColumnLayer())
        for layer, (keys, values) in zip(self._column_layers(), states, strict=True):
            if copies is not None:
                keys, values = (part[copies.to(part.device)] for part in (keys, values))
            layer.place(slots, n_rows, self.columns, keys, values)

    def _column_layers(self) -> list[ColumnLayer]:
        return cast("list[ColumnLayer]", self.layers.layers)


def texts(ids: Tensor, rows: list[int], lengths: np.ndarray) -> list[np.ndarray]:
    """Return the first tokens of some rows of ids (B, T) on the host, as many as `lengths`, (B,), says."""
    if not rows:
        return []
    tokens = ids[rows, : lengths[rows].max()].cpu().numpy()
    return [own[: lengths[row]] for row, own in zip(rows, tokens, strict=True)]


def copies_of(similar: list[Alike]) -> Tensor | None:
    """Return the index of its list for each row, (R,); None if no list has a second row."""
    sizes = [len(alike) for alike in similar]
    return torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)) if max(sizes) > 1 else None


def by_layer(cache: Cache) -> States:
    """Return the keys and values that a forward has just computed, (R, heads, T, size) each, by layer."""
    states = []
    for layer in cast("list[DynamicLayer]", cache.layers):
        assert layer.keys is not None and layer.values is not None, "just computed"
        states.append((layer.keys, layer.values))
    return states
