"""What the policy needs of a language model; `Backbone` is the one for transformers' models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache


class LanguageModel(Protocol):
    """A causal language model that is read at chosen places; an `nn.Module`, whose parameters are trained.

    A batch is (B, T) tokens, padded on the right without an attention mask, or on the left with one. What is read at
    a place may depend on no token after it, and on no padding. Gradients flow from hidden states and logits to every
    parameter with `requires_grad`.

    Attributes:
        vocab_size: How many tokens can be sampled: the columns of the logits.
        hidden_size: The size of the hidden states, which the critic reads.
        is_cacheable: Whether a row can be decoded from keys and values that were computed for it alone, beside other
            rows. Where not, `prefill` is never called, and neither mask, positions nor cache are ever passed.
        takes_new_rows: Whether tokens of a new row may stand behind those of a step, as `StepLayout` says; False where
            each row of a batch must be a row of the cache.
        takes_cache: Whether a read may be given a cache now; False while layers compute their activations again.
        is_encoder_decoder: Whether `read` wants, as a fourth input, how many tokens of each row are the prompt's.

    Example:
        >>> from agents.backbone import Backbone
        >>> from agents.language_model import LanguageModel
        >>> def largest_token(lm: LanguageModel) -> int:
        ...     return lm.vocab_size - 1
    """

    vocab_size: int
    hidden_size: int
    is_cacheable: bool
    takes_new_rows: bool
    is_encoder_decoder: bool

    @property
    def takes_cache(self) -> bool:
        """Whether a read may be given a cache now."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        ...

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        """Raise ValueError where `n_tokens`, and `n_written` behind them, are more than the model can read."""
        ...

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, H) and logits (N, V); the inputs are those of `read`."""
        ...

    def read(
        self,
        ids: Tensor,
        rows: Tensor,
        cols: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (N, H) at the places (rows, cols) of `ids` (B, T).

        The logits (N, V) come with them where they do not follow from the hidden states, else None and `logits` is
        asked. With a cache `ids` are the tokens that follow what is in it, and it is extended in place.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H), where `read` gave none."""
        ...

    def prefill(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Cache:
        """Return the keys and values of left-padded rows (B, T), a column a token."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the weights; `PrefixCache` looks at their versions to notice that they were written."""
        ...
