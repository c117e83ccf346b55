"""The only file that knows transformers' models: load one, read hidden states and logits, check what it can do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from textenv.model_loading import n_positions

from .cache import PrefixCache
from .decoding import attends_by_row, attention_by_row
from .interface import LengthError
from .layers import disable_dropout, fuse_activations
from .trainable import is_checkpointing, is_placed

PROBE_LENGTH = 4
PROBE_LOGIT = 100.0  # what the largest logit of the probe is scaled to
PROBE_TOLERANCE = 1e-3
SHORTER = "lower max_prompt_tokens or max_new_tokens"


def check_fits(model: PreTrainedModel, vocab_size: int, n_positions: int, cure: str = SHORTER) -> None:
    """Raise ValueError where the model has fewer embedding rows or positions than that."""
    rows = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if rows < vocab_size:
        raise ValueError(
            f"Expected a model with at least the {vocab_size} tokens of the tokenizer, got {rows} embedding rows. "
            "Use the model's own tokenizer, or resize_token_embeddings and save the model."
        )
    check_length(model, n_positions, cure)


def check_length(model: PreTrainedModel, n_tokens: int, cure: str = SHORTER) -> None:
    """Raise LengthError where sequences of `n_tokens` are longer than the model can read."""
    limit = n_positions(model.config)
    if limit is not None and n_tokens > limit:
        fact = f"Expected prompt and completion to fit the model's {limit} positions, got up to {n_tokens} tokens"
        raise LengthError(fact, cure, n_tokens - limit)


class Backbone(nn.Module):
    """A causal language model, read as hidden states and logits at chosen places.

    What it relies on is checked once, on a probe of a few tokens: whether logits are the output embeddings of the
    hidden states (not so for Cohere, Granite or Gemma-2, which get their full forward), and whether decoding with
    cached keys and values equals a full forward (not so for recurrent models, which then run without, with a warning).

    Args:
        model: The model.
        vocab_size: How many tokens the tokenizer has; embedding rows beyond it are never sampled and never scored.
        n_positions: The longest sequence that will be asked for, in tokens.

    Raises:
        ValueError: If the model has fewer embedding rows or positions than that.
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
        """Raise ValueError where `n_tokens`, and `n_written` behind them, are more than the model can read."""
        check_length(self.model, n_tokens + n_written)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    @property
    def takes_cache(self) -> bool:
        """Whether a read may be given a cache now: layers that compute their activations again drop it."""
        return not (self.training and is_checkpointing(self.model))

    def new_cache(self) -> PrefixCache | None:
        """Return what decodes one token a row from cached keys and values; None where that would not be exact."""
        return PrefixCache(self) if self.is_cacheable else None

    @contextmanager
    def whole_model(self) -> Iterator[PreTrainedModel]:
        """Give the model as transformers built it, each weight a parameter in its place, to be saved."""
        yield self.model

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        """Move or cast the weights, but those that transformers dispatched or quantised stay where it put them."""
        return self if is_placed(self.model) else super()._apply(fn, recurse)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, H) and logits (N, V); the inputs are those of `read`."""
        hidden, logits = self.read(*inputs)
        return hidden, self.logits(hidden) if logits is None else logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H), where the head is linear."""
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
        """Run the trunk and read it at the places (rows, cols); the head is left to `logits` where it is linear.

        Args:
            ids: Tokens, (B, T); without a mask padded on the right, which a causal model does not see.
            rows: Which rows to read, (N,).
            cols: Which columns of those rows, (N,).
            attention_mask: True at real tokens, cached ones included, (B, cached + T).
            position_ids: The position of each token in its row, (B, T).
            cache: Keys and values of earlier tokens; extended in place.

        Returns:
            Hidden states (N, H), and logits (N, V) where they do not follow from those, else None.
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
                return at(self.model.base_model(**inputs).last_hidden_state, rows, cols), None  # (N, H)
            output = self.model(**inputs, output_hidden_states=True)
        return at(output.hidden_states[-1], rows, cols), at(output.logits[..., : self.vocab_size], rows, cols)

    def prefill(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Cache:
        """Return the keys and values of left-padded rows, (B, T)."""
        # Without a config the cache keeps every column of sliding-window layers too; the mask does the sliding.
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
        places = self.probe_places()
        was_training = self.model.training
        self.model.eval()
        head = self.model.get_output_embeddings()
        largest = float(head(self.read(*places)[0]).abs().max())
        # A soft cap bends large logits only, and fresh weights, which trained ones may replace, give small ones.
        scale = PROBE_LOGIT / max(largest, 1e-6)
        hook = head.register_forward_hook(lambda module, inputs, output: output * scale)
        expected = self._full_logits(*places)
        hidden, logits = self(*places)
        self.head_is_linear = close(logits, expected)
        if not self.head_is_linear:
            hidden, logits = self(*places)
        self.hidden_size = hidden.shape[-1]
        self.is_cacheable = not self.model._is_stateful and self._decodes_like(expected, *places)
        self.takes_new_rows = self.is_cacheable and self._takes_new_rows(expected, *places)
        hook.remove()
        self.model.train(was_training)
        if not self.is_cacheable:
            warnings.warn(
                f"{type(self.model).__name__} does not decode exactly from cached keys and values (recurrent layers?): "
                "it runs without a cache, in time that grows with the square of the length.",
                stacklevel=2,
            )

    def probe_places(self) -> tuple[Any, ...]:
        """Return the inputs of `read` for the last of a few tokens."""
        ids = torch.arange(PROBE_LENGTH, device=self.device)[None] % self.vocab_size  # (1, T)
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return ids, zero, zero + PROBE_LENGTH - 1

    def _full_logits(self, ids: Tensor, *places: Tensor) -> Tensor:
        """Return the logits (1, V) that the whole model has there."""
        return self.model(input_ids=ids, use_cache=False).logits[0, -1:, : self.vocab_size]

    def _decodes_like(self, expected: Tensor, ids: Tensor, *places: Tensor) -> bool:
        """Whether two left-padded rows, decoded with a cache, end in the logits of the full forward."""
        device = ids.device
        first = PROBE_LENGTH - 1
        padded = torch.cat([torch.zeros_like(ids[:, :2]), ids[:, :first]], dim=1)  # (1, 2 + T - 1)
        positions = torch.tensor([[0, 0, *range(first)]], device=device)
        cache = self.prefill(padded, positions.new_tensor([[0, 0, *[1] * first]]), positions)
        mask = positions.new_tensor([[0, 0, *[1] * PROBE_LENGTH]])
        zero = torch.zeros(1, dtype=torch.long, device=device)
        _, logits = self(ids[:, -1:], zero, zero, mask, positions.new_tensor([[first]]), cache)
        return close(logits, expected)

    def _takes_new_rows(self, expected: Tensor, ids: Tensor, *places: Tensor) -> bool:
        """Whether a row that is new beside one that goes on ends in the logits of the full forward."""
        if self.is_encoder_decoder or not attends_by_row(self.model.config.get_text_config()):
            return False
        self.takes_new_rows = True
        cache = PrefixCache(self)
        lengths = torch.tensor([2, 1], device=ids.device)
        cache.read(ids.expand(2, -1), lengths)
        try:
            logits = cache.read(ids.expand(2, -1), lengths.new_tensor([3, PROBE_LENGTH]))[1]
        except NotImplementedError:
            return False
        return close(logits[1:], expected)


def at(states: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return what is at (rows, cols) of (B, T, ...), (N, ...), where the places are: a device map may end elsewhere."""
    return states[rows.to(states.device), cols.to(states.device)].to(rows.device)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether logits agree up to `PROBE_TOLERANCE` of the largest."""
    scale = max(1.0, float(b.abs().max()))
    return bool(torch.allclose(a.float(), b.float(), atol=PROBE_TOLERANCE * scale))
