"""A causal language model of transformers, read as hidden states and logits, cached if decoding is then exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from textenv.huggingface.positions import length_limit, n_positions

from .interface import LengthError
from .layers import evaluate_in_checkpoints, fuse_activations, set_mode, trunk_of
from .prefix_cache import PrefixCache
from .probe import PROBE_LENGTH, probe
from .prompt_layout import SharedPrompts
from .prompt_probe import Sharing, examine_sharing
from .shared_prompts import read_shared
from .step_layout import attention_by_row, can_join_rows
from .trainable import is_checkpointing, is_placed

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
    limit = length_limit(model)
    if limit is not None and n_tokens > limit.n_tokens:
        fact = (
            f"Expected prompt and completion to fit the model's {limit.n_tokens} {limit.kind}, got up to {n_tokens} "
            "tokens"
        )
        raise LengthError(fact, f"{cure}, {limit.cure}" if limit.cure else cure, n_tokens - limit.n_tokens)


class Backbone(nn.Module):
    """A causal language model of transformers, read as hidden states and logits at chosen positions.

    A probe of a few tokens tests at construction whether the model can be trained exactly (`probe.probe`), and sets:

    - `head_is_linear`: whether the logits are the output embedding of the hidden states. Cohere and Granite scale them,
      and Gemma-2 caps them: such a model runs its full forward, which computes logits at every position.
    - `is_cacheable`: whether decoding with cached keys and values gives the logits of a full forward. Recurrent models
      run without a cache, with a warning; `no_cache_because` has the reason.
    - `attends_by_row` and `takes_new_rows`: how a decoding step computes attention; see `step_layout`.
    - `shares_prompts`: whether texts read behind the keys and values of a prompt that was read once have the states and
      the gradient of whole texts, in the mode of the moment; see `shared_prompts`, and `shared_encodings` for
      encoder-decoders.

    Args:
        model: The model. In training mode too, its modules stay in evaluation mode, without dropout or other noise.
        vocab_size: V, the number of tokens of the tokenizer. Embedding rows beyond it are never sampled nor scored.
        n_positions: The longest sequence that will be read, in tokens.

    Raises:
        ValueError: If the model has fewer embedding rows or positions; or if the probe refuses it, since it is not
            causal, computes something random or not finite, or fails.

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
    hidden_size: int
    head_is_linear: bool
    is_cacheable: bool
    no_cache_because: str
    attends_by_row: bool
    takes_new_rows: bool

    def __init__(self, model: PreTrainedModel, vocab_size: int, n_positions: int) -> None:
        super().__init__()
        check_fits(model, vocab_size, n_positions)
        self.model = model
        evaluate_in_checkpoints(model)
        fuse_activations(model)
        self.vocab_size = vocab_size
        self.attends_by_row = False
        self.train(False)
        probe(self)
        self._sharing = Sharing()
        if self.is_cacheable:
            self._sharing = examine_sharing(self.read, self.read_shared, model, vocab_size)
        self.train()  # as every new module of PyTorch

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; both compute the same numbers, since noise is off in both (`layers.set_mode`)."""
        super().train(mode)
        set_mode(self.model, mode)
        return self

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

    @property
    def most_columns(self) -> int | None:
        """The most columns in which attention may see a prompt and a completion; None where nothing limits them."""
        return self.longest

    @property
    def shares_prompts(self) -> bool:
        """Whether `read_shared` is exact now: in training, layers may be under activation checkpointing."""
        return self._sharing.now(self.model, self.training)

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
        by_row = attention_by_row(self.model.config.get_text_config()) if self.attends_by_row else nullcontext()
        with by_row:
            hidden, *logits = self._states(**inputs)
        return at(hidden, rows, cols), at(logits[0], rows, cols) if logits else None

    def _states(self, **inputs: Any) -> tuple[Tensor, ...]:
        """Return all hidden states, (B, T, H), and all logits, (B, T, V), if the head is not linear."""
        if self.head_is_linear:
            return (trunk_of(self.model)(**inputs).last_hidden_state,)
        with head_input(self.model) as seen:
            logits = self.model(**inputs).logits[..., : self.vocab_size]
        return whole_states(seen, logits), logits

    def read_shared(self, shared: SharedPrompts) -> tuple[Tensor, Tensor | None]:
        """Return what `read` does for whole sequences, each distinct prompt of which is read once.

        Only where `shares_prompts`.
        """
        hidden, *logits = read_shared(self._states, self.model, shared)
        return hidden, logits[0] if logits else None

    def prefill(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Cache:
        """Return the keys and values of left-padded rows, (B, T); mask and positions have the same shape."""
        # With a config, transformers `cache_utils.DynamicCache` makes a `DynamicSlidingWindowLayer` for each layer with
        # a window, which drops old columns. Without one every column is kept, and the model's mask hides the old ones.
        cache = DynamicCache()
        trunk_of(self.model)(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def probe_inputs(self) -> tuple[Any, ...]:
        """Return the arguments of `read` for the last token of one row of a few tokens."""
        ids = torch.arange(PROBE_LENGTH, device=self.device)[None] % self.vocab_size  # (1, T)
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return ids, zero, zero + PROBE_LENGTH - 1

    def plain_logits(self, ids: Tensor, n_prompt: Tensor) -> Tensor:
        """Return the logits (T, V) after each token of one row (1, T), by the model's own forward, without a cache.

        `n_prompt`, the number of prompt tokens, (1,), is for encoder-decoders alone.
        """
        return self.model(input_ids=ids, use_cache=False).logits[0, :, : self.vocab_size]

    def decoding_modes(self) -> Iterator[tuple[bool, bool]]:
        """Yield values of (`attends_by_row`, `takes_new_rows`) that the probe tries, the fastest first."""
        if can_join_rows(self.model.config.get_text_config()):
            yield True, True
        yield from ((True, False), (False, False))


@contextmanager
def head_input(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list to which each forward of the model adds the input of its output embedding, hidden states (B, T, H).

    The `hidden_states` that models return on request are not always these: those of Gemma-3n have a dimension more.
    """
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def whole_states(seen: list[Tensor], logits: Tensor) -> Tensor:
    """Return the hidden states (B, T, H) that logits (B, T, V) come from: the last ones in the list of `head_input`.

    Raises:
        NotImplementedError: If the output embedding was not run on hidden states of this shape. The probe puts the
            message into its own error, behind the model's name.
    """
    if not seen or seen[-1].ndim != 3 or seen[-1].shape[:2] != logits.shape[:2]:
        shapes = [tuple(states.shape) for states in seen]
        raise NotImplementedError(f"its output embedding is run on {shapes}, not on (rows, tokens, size)")
    return seen[-1]


def at(states: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return `states[rows, cols]`, (N, ...) of (B, T, ...), on the device of `rows`: a device map may use several."""
    return states[rows.to(states.device), cols.to(states.device)].to(rows.device)
