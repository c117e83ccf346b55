"""Forwards that read each distinct prompt once, and the completions behind the prompts' keys and values.

The gradient goes back through the keys and values, so that it is that of whole sequences. A trunk that reads whole
sequences computes the same from their first column on: attention is causal, so that a prompt does not depend on what
follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .layers import keys_in_checkpoints
from .prompt_layout import SharedPrompts

# All states (B, T, ...) of a forward, given the arguments of a trunk of transformers: hidden states, perhaps logits.
Forward: TypeAlias = Callable[..., tuple[Tensor, ...]]


class OfPrompts(DynamicLayer):
    """The keys and values of one layer as attention made them; transformers' own layer copies them (`torch.cat`)."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep and return the keys and values of whole prompts, (G, heads, P, size).

        A layer under activation checkpointing runs again in the backward pass. The completions have read the states of
        the first time, through which their gradients come back; the others would only keep activations in memory.
        """
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class BehindPrompts(DynamicLayer):
    """The keys and values of one layer, where each row continues one of the prompts.

    They are copied from the prompts' when the layer is reached, and not kept: under activation checkpointing, those of
    one layer alone are held twice. A layer that runs again in the backward pass gets the same.

    Args:
        layer: The keys and values of the prompts.
        source: The index among the G * P columns of the one that each of the s * W columns of the rows holds.
        n_rows: The number of rows, s.
    """

    def __init__(self, layer: OfPrompts, source: Tensor, n_rows: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None, "just computed"
        self.prompts, self.source, self.n_rows = (layer.keys, layer.values), source, n_rows
        self.n_before = self.n_columns = len(source) // n_rows  # W, and the number of columns in use
        self.is_initialized = True  # otherwise transformers takes the layer for empty

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the prompts and of the completions behind them, (s, heads, W + C, size).

        Attention calls it through transformers' `cache_utils.Cache.update`, with states (s, heads, C, size).
        """
        pairs = zip(self.prompts, (key_states, value_states), strict=True)
        keys, values = (torch.cat([self._expanded(states), own], dim=2) for states, own in pairs)
        self.n_columns = self.n_before + key_states.shape[2]
        return keys, values

    def _expanded(self, states: Tensor) -> Tensor:
        """Return the columns before the completions, (s, heads, W, size), of the prompts' (G, heads, P, size)."""
        # Attention has made the states from (G, P, heads * size): these are the rows in memory, and are copied whole.
        columns = states.transpose(1, 2).flatten(0, 1)  # (G * P, heads, size)
        rows = columns.index_select(0, self.source.to(states.device))  # (s * W, heads, size)
        return rows.unflatten(0, (self.n_rows, -1)).transpose(1, 2)

    def get_seq_length(self) -> int:
        """Return the number of columns in use, from which transformers makes masks and positions."""
        return self.n_columns


def read_shared(forward: Forward, model: nn.Module, shared: SharedPrompts) -> tuple[Tensor, ...]:
    """Return the states (N, ...) at the transitions of sequences that share prompts.

    Args:
        forward: Returns all states of tokens, (B, T, ...), as one tensor or several.
        model: The model behind it, whose layers may be under activation checkpointing.
        shared: The sequences.
    """
    with keys_in_checkpoints(model) as in_checkpoints:
        # Most models take `past_key_values` without it; of checkpointed layers, transformers warns that it is ignored.
        parts = _read_parts(partial(forward, use_cache=not in_checkpoints), shared)
    return tuple(at_transitions(same, shared) for same in zip(*parts, strict=True))


def _read_parts(forward: Forward, shared: SharedPrompts) -> list[tuple[Tensor, ...]]:
    """Return all states (B, T, ...) of the prompts, then those of each of the completions."""
    # A layer is made when the model first writes to it; with a window, too, it keeps all columns.
    cache = Cache(layer_class_to_replicate=OfPrompts)
    parts = [forward(input_ids=shared.prompts, past_key_values=cache)]  # without mask, as whole ones
    layers = cast("list[OfPrompts]", cache.layers)
    for completions in shared.completions:
        inputs: dict[str, Any] = {"input_ids": completions.ids, "position_ids": completions.positions}
        if completions.mask is not None:
            inputs["attention_mask"] = completions.mask
        behind = Cache(layers=[BehindPrompts(layer, completions.source, len(completions.ids)) for layer in layers])
        parts.append(forward(**inputs, past_key_values=behind))
    return parts


def at_transitions(parts: Sequence[Tensor], shared: SharedPrompts) -> Tensor:
    """Return the states (N, ...) at the transitions, of all states (B, T, ...) of prompts and completions."""
    pairs = zip(parts, shared.chosen, strict=True)
    states = [part.flatten(0, 1).index_select(0, index.to(part.device)) for part, index in pairs]
    return torch.cat(states)[shared.order.to(parts[0].device)].to(shared.order.device)
