"""Forwards of an encoder-decoder that encode each distinct prompt once, for all completions that belong to it.

The decoder reads its start token once for each prompt, too. That gives the states at the prompts' ends, and the keys
and values of cross-attention, which are all that the decoder takes from the encoder's output: a completion gets copies
of its prompt's. The gradient goes back through them, so that it is that of whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from .prompt_layout import Completions, SharedPrompts
from .shared_prompts import BehindPrompts, OfPrompts, at_transitions

# The hidden states (B, T, H) of the decoder, given its newest tokens (B, T), the mask of the prompts (B, S), the mask
# of all tokens of the decoder, and keys and values of earlier tokens and of the prompts.
Decode: TypeAlias = Callable[[Tensor, Tensor, Tensor, EncoderDecoderCache], Tensor]


class BesidePrompts(BehindPrompts):
    """The keys and values of cross-attention in one layer, where each row belongs to one of the prompts.

    Attention reads them as attributes of the layer (transformers' `modeling_t5.T5Attention.forward`, once
    `EncoderDecoderCache.is_updated`). They are copied at each look, so that those of one layer alone are held twice.
    """

    @property
    def keys(self) -> Tensor:
        """The keys, (s, heads, W, size)."""
        return self._expanded(self.prompts[0])

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        """Take no notice: `cache_utils.CacheLayerMixin.__init__` of transformers begins with None."""

    @property
    def values(self) -> Tensor:
        """The values, (s, heads, W, size)."""
        return self._expanded(self.prompts[1])

    @values.setter
    def values(self, states: Tensor | None) -> None:
        """Take no notice, as of keys."""


def empty_cache() -> EncoderDecoderCache:
    """Return a cache that takes the keys and values of prompts, and of the decoder's start token."""
    return EncoderDecoderCache(*(Cache(layer_class_to_replicate=OfPrompts) for _ in range(2)))


def read_encoded(start: Tensor, cache: EncoderDecoderCache, decode: Decode, shared: SharedPrompts) -> Tensor:
    """Return the decoder's hidden states (N, H) at the transitions of sequences that share prompts.

    Args:
        start: The decoder's states after its start token, (G, 1, H), one row for each prompt.
        cache: The `empty_cache` that the decoder has filled on the way.
        decode: The decoder.
        shared: The sequences.

    Raises:
        ValueError: If a transition is inside a prompt.
    """
    width = shared.prompts.shape[1]
    rows, cols = shared.chosen[0] // width, shared.chosen[0] % width
    before = shared.n_prompt[rows] - 1 - cols  # (n,)
    if (before > 0).any():
        raise ValueError(f"Expected columns from a prompt's last token on, got one {int(before.max())} before it.")
    parts = [start.expand(-1, width, -1)]  # (G, P, H): the state at a prompt's end, in all of its columns
    for part in shared.completions:
        is_prompt, behind = _behind(part, cache, width)
        mask = is_prompt.new_ones(len(part.ids), 1 + part.ids.shape[1])  # of the start token and of the completions
        parts.append(decode(part.ids, is_prompt, mask, behind))
    return at_transitions(parts, shared)


def _behind(part: Completions, cache: EncoderDecoderCache, width: int) -> tuple[Tensor, EncoderDecoderCache]:
    """Return the mask of the prompts of some completions, (s, W), and their copies of the keys and values."""
    n_rows = len(part.ids)
    columns = part.source.unflatten(0, (n_rows, -1))  # (s, W), of which the last one is each prompt's last token
    is_prompt = torch.ones_like(columns) if part.mask is None else part.mask[:, : columns.shape[1]]
    of_start = columns[:, -1] // width  # (s,): the row of the prompt, of whose start token there is one column
    own, of_prompts = (
        cast("list[OfPrompts]", half.layers) for half in (cache.self_attention_cache, cache.cross_attention_cache)
    )
    copies = (
        Cache(layers=[BehindPrompts(layer, of_start, n_rows) for layer in own]),
        Cache(layers=[BesidePrompts(layer, part.source, n_rows) for layer in of_prompts]),
    )
    return is_prompt, EncoderDecoderCache(*copies)
