"""A causal language model of transformers, read as hidden states and logits, cached if decoding is then exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from textenv.huggingface.weights import n_positions

from .interface import LengthError
from .layers import disable_dropout, fuse_activations
from .prefix_cache import PrefixCache
from .step_layout import attends_by_row, attention_by_row
from .trainable import is_checkpointing, is_placed

PROBE_LENGTH = 4  # tokens: three to read first, and one more to decode from their keys and values
PROBE_LOGIT = 100.0  # the probe's largest logit, after scaling: beyond the soft cap of Gemma-2 (30)
PROBE_TOLERANCE = 1e-3  # of the largest logit: kernels differ by about 1e-6 in float32, a wrong mask by much more
SHORTER = "lower max_prompt_tokens or max_new_tokens"  # the usual cure for sequences that are too long


def check_fits(model: PreTrainedModel, vocab_size: int, n_positions: int, cure: str = SHORTER) -> None:
    """Raise ValueError if the model has fewer embedding rows or fewer positions than needed.

    Args:
        model: The model.
        vocab_size: The number of tokens of the tokenizer.
        n_positions: The longest sequence that will be read, in tokens.
        cure: The settings to change against sequences that are too long: the end of the message.
    """
    n_rows = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if n_rows < vocab_size:
        raise ValueError(
            f"Expected a model with at least the {vocab_size} tokens of the tokenizer, got {n_rows} embedding rows. "
            "Use the model's own tokenizer, or resize_token_embeddings and save the model."
        )
    check_length(model, n_positions, cure)


def check_length(model: PreTrainedModel, n_tokens: int, cure: str = SHORTER) -> None:
    """Raise LengthError if sequences of `n_tokens` are longer than the model can read."""
    limit = n_positions(model)
    if limit is not None and n_tokens > limit:
        fact = f"Expected prompt and completion to fit the model's {limit} positions, got up to {n_tokens} tokens"
        raise LengthError(fact, cure, n_tokens - limit)


class Backbone(nn.Module):
    """A causal language model of transformers, read as hidden states and logits at chosen positions.

    Two assumptions are tested once, on a probe of a few tokens:

    - The logits are the output embedding of the hidden states (`head_is_linear`). Cohere and Granite scale them, and
      Gemma-2 caps them: such a model runs its full forward, which computes logits at every position.
    - Decoding with cached keys and values gives the logits of a full forward (`is_cacheable`). Recurrent models do not:
      they run without a cache, with a warning.

    Args:
        model: The model. Its dropout is switched off, in place.
        vocab_size: V, the number of tokens of the tokenizer. Embedding rows beyond it are never sampled nor scored.
        n_positions: The longest sequence that will be read, in tokens.

    Raises:
        ValueError: If the model has fewer embedding rows or positions.

    Example:
        >>> from transformers import GPT2Config
        >>> from agents.models.pretrained import build_model
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40, bos_token_id=0, eos_token_id=0)
        >>> backbone = Backbone(build_model(config), vocab_size=33, n_positions=16)
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 0]])  # (B, T), the second row padded
        >>> hidden, logits = backbone(ids, torch.tensor([0, 1]), torch.tensor([2, 1]))  # after the last token of each
        >>> hidden.shape, logits.shape
        (torch.Size([2, 8]), torch.Size([2, 33]))
    """

    is_encoder_decoder = False

    def __init__(self, model: PreTrainedModel, vocab_size: int, n_positions: int) -> None:
        super().__init__()
        check_fits(model, vocab_size, n_positions)
        self.model = model
        disable_dropout(model)
        fuse_activations(model)
        self.vocab_size = vocab_size
        self.head_is_linear = True
        self._probe()

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        """Raise LengthError if the model cannot read a prompt of `n_tokens` followed by `n_written` tokens."""
        check_length(self.model, n_tokens + n_written)

    @property
    def device(self) -> torch.device:
        """The device of the model; of its first layers, if a device map spreads them over several devices."""
        return self.model.device

    @cached_property
    def longest(self) -> int | None:
        """The longest sequence that the model's positions allow, in tokens; None where they set no limit."""
        return n_positions(self.model)

    @property
    def takes_cache(self) -> bool:
        """Whether `read` can use a cache now: in training, layers under activation checkpointing ignore it."""
        return not (self.training and is_checkpointing(self.model))

    def new_cache(self) -> PrefixCache | None:
        """Return an empty cache of keys and values; None if decoding from one would not be exact."""
        return PrefixCache(self) if self.is_cacheable else None

    @contextmanager
    def whole_model(self) -> Iterator[PreTrainedModel]:
        """Yield the model as transformers built it, to be saved: every weight is a parameter under its own name."""
        yield self.model

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        """Move or cast the weights; those that transformers has placed or quantised stay as they are.

        `nn.Module.to`, `cuda`, `float` and the like all end here.
        """
        return self if is_placed(self.model) else super()._apply(fn, recurse)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, H) and logits (N, V); takes the arguments of `read`."""
        hidden, logits = self.read(*inputs)
        return hidden, self.logits(hidden) if logits is None else logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H); right only where `head_is_linear`."""
        # A device map may put the head on another device than the last layer.
        return self.model.get_output_embeddings()(hidden)[:, : self.vocab_size].to(hidden.device)

    def read(
        self,
        ids: Tensor,
        rows: Tensor,
        cols: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states at the positions (rows, cols) of a batch, and the logits if the head is not linear.

        A linear head is left to `logits`: run at the N positions alone, it needs no tensor of (B, T, V).

        Args:
            ids: Tokens, (B, T). Without `attention_mask` they are padded on the right: attention is causal, so no real
                token attends to padding.
            rows: The row of each position, (N,).
            cols: The column of each position, (N,): the hidden state there has read the tokens up to it.
            attention_mask: Nonzero at real tokens, cached ones included, (B, cached + T).
            position_ids: The position of each token in its row, (B, T).
            cache: Keys and values of earlier tokens; extended in place.

        Returns:
            Hidden states (N, H), and None if `head_is_linear`, else logits (N, V).
        """
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if cache is not None:
            inputs["past_key_values"] = cache
        with attention_by_row(self.model.config.get_text_config()):
            if self.head_is_linear:
                # `PreTrainedModel.base_model` is the model without its head; its output is the last layer's, normed.
                return at(self.model.base_model(**inputs).last_hidden_state, rows, cols), None  # (N, H)
            # transformers `utils.output_capturing.capture_outputs` ends `hidden_states` with `last_hidden_state`.
            output = self.model(**inputs, output_hidden_states=True)
        return at(output.hidden_states[-1], rows, cols), at(output.logits[..., : self.vocab_size], rows, cols)

    def prefill(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Cache:
        """Return the keys and values of left-padded rows, (B, T); mask and positions have the same shape."""
        # With a config, transformers `cache_utils.DynamicCache` makes a `DynamicSlidingWindowLayer` for each layer with
        # a window, which drops old columns. Without one every column is kept, and the model's mask hides the old ones.
        cache = DynamicCache()
        self.model.base_model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    @torch.no_grad()
    def _probe(self) -> None:
        """Test the two assumptions of the class on a few tokens."""
        inputs = self.probe_inputs()
        was_training = self.model.training
        self.model.eval()
        head = self.model.get_output_embeddings()
        largest = float(head(self.read(*inputs)[0]).abs().max())
        # A soft cap bends large logits only. Fresh weights give small ones, and trained weights may replace them after
        # the probe: scaled up, the logits of either show the cap.
        scale = PROBE_LOGIT / max(largest, 1e-6)
        hook = head.register_forward_hook(lambda module, inputs, output: output * scale)
        expected = self._full_logits(*inputs)
        hidden, logits = self(*inputs)
        self.head_is_linear = close(logits, expected)
        if not self.head_is_linear:
            hidden, logits = self(*inputs)
        self.hidden_size = hidden.shape[-1]
        self.is_cacheable = not self.model._is_stateful and self._decodes_like(expected, *inputs)
        self.takes_new_rows = self.is_cacheable and self._takes_new_rows(expected, *inputs)
        hook.remove()
        self.model.train(was_training)
        if not self.is_cacheable:
            warnings.warn(
                f"{type(self.model).__name__} does not decode exactly from cached keys and values (recurrent layers?): "
                "it runs without a cache, in time that grows with the square of the length.",
                stacklevel=2,
            )

    def probe_inputs(self) -> tuple[Any, ...]:
        """Return the arguments of `read` for the last token of one row of a few tokens."""
        ids = torch.arange(PROBE_LENGTH, device=self.device)[None] % self.vocab_size  # (1, T)
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return ids, zero, zero + PROBE_LENGTH - 1

    def _full_logits(self, ids: Tensor, *inputs: Tensor) -> Tensor:
        """Return the logits (1, V) after the last token, computed by the whole model."""
        return self.model(input_ids=ids, use_cache=False).logits[0, -1:, : self.vocab_size]

    def _decodes_like(self, expected: Tensor, ids: Tensor, *inputs: Tensor) -> bool:
        """Return whether the last token of a left-padded row, read with a cache, gets the logits of a full forward."""
        device = ids.device
        first = PROBE_LENGTH - 1
        padded = torch.cat([torch.zeros_like(ids[:, :2]), ids[:, :first]], dim=1)  # (1, 2 + T - 1), two of padding
        positions = torch.tensor([[0, 0, *range(first)]], device=device)
        cache = self.prefill(padded, positions.new_tensor([[0, 0, *[1] * first]]), positions)
        mask = positions.new_tensor([[0, 0, *[1] * PROBE_LENGTH]])
        zero = torch.zeros(1, dtype=torch.long, device=device)
        _, logits = self(ids[:, -1:], zero, zero, mask, positions.new_tensor([[first]]), cache)
        return close(logits, expected)

    def _takes_new_rows(self, expected: Tensor, ids: Tensor, *inputs: Tensor) -> bool:
        """Return whether a new row, read beside one that grows by a token, gets the logits of a full forward."""
        if self.is_encoder_decoder or not attends_by_row(self.model.config.get_text_config()):
            return False
        self.takes_new_rows = True
        cache = PrefixCache(self)
        lengths = torch.tensor([2, 1], device=ids.device)
        cache.read(ids.expand(2, -1), lengths)
        try:  # row 0 grows from 2 tokens to 3; row 1, from 1 to all, counts as new
            logits = cache.read(ids.expand(2, -1), lengths.new_tensor([3, PROBE_LENGTH]))[1]
        except NotImplementedError:  # from `step_layout._attend`: attention with a position bias, such as MPT's ALiBi
            return False
        return close(logits[1:], expected)


def at(states: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return `states[rows, cols]`, (N, ...) of (B, T, ...), on the device of `rows`: a device map may use several."""
    return states[rows.to(states.device), cols.to(states.device)].to(rows.device)


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether logits agree up to `PROBE_TOLERANCE` of the largest of `b`."""
    scale = max(1.0, float(b.abs().max()))
    return bool(torch.allclose(a.float(), b.float(), atol=PROBE_TOLERANCE * scale))
