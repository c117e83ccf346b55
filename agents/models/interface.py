"""The interfaces of a language model, of its decoding cache and of the spec that builds it.

`Backbone` implements them for transformers' models, `examples/remote_lm.py` for a model whose layers run in other
processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Cache

from .sequences import Chunk, SequenceBatch


class LengthError(ValueError):
    """The error of sequences that are longer than a model can read.

    Args:
        fact: The expected and the actual length: the first half of the message.
        cure: The settings that the caller may change: the second half of the message.
        excess: How many tokens shorter completions would have to be; None if the prompts alone are too long.
    """

    def __init__(self, fact: str, cure: str, excess: int | None) -> None:
        super().__init__(fact, cure, excess)
        self.fact, self.cure, self.excess = fact, cure, excess

    def __str__(self) -> str:
        """Return fact and cure as one sentence."""
        return f"{self.fact}: {self.cure}."


class LanguageModel(Protocol):
    """A language model that is read at chosen positions: an `nn.Module`, of transformers or not.

    This is all that actor, critic, buffers, KL penalty, evaluation and checkpoints ask of a model. Code that needs a
    model of transformers (`export`, adapters, some checks of the doctor) refuses any other by name.

    A batch is (B, T) tokens, padded on the right, without an attention mask. The output at a position depends only on
    the tokens up to that position, hence never on padding, and is not random. Hidden states and logits can be
    differentiated once with respect to every parameter with `requires_grad` (`torch.autograd.grad`; no second
    derivative). The policy may run a forward again in the backward pass, as activation checkpointing does. Checkpoints
    and `model.save` keep parameters and buffers, and nothing else. A copy (`copy.deepcopy`) has weights of its own.

    Attributes:
        vocab_size: V, the number of tokens that can be sampled: the columns of the logits.
        hidden_size: H, the size of the hidden states, which the critic reads.
        is_encoder_decoder: Whether `read` takes a further argument after `cols`, and a cache's `read` after the
            lengths: the number of prompt tokens of each row, (B,).

    Example:
        >>> from agents import LanguageModel
        >>> def largest_token(lm: LanguageModel) -> int:
        ...     return lm.vocab_size - 1
    """

    vocab_size: int
    hidden_size: int
    is_encoder_decoder: bool

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be read now; False while activation checkpointing recomputes layers."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of tokens, hidden states and logits."""
        ...

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        """Raise ValueError if the model cannot read a prompt of `n_tokens` followed by `n_written` tokens.

        A `LengthError` also has the `excess`, by which the caller shortens a default length.
        """
        ...

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, H) and logits (N, V); takes the arguments of `read`."""
        ...

    def read(self, ids: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states (N, H) at the positions (rows, cols) of `ids` (B, T), and perhaps the logits there.

        The logits (N, V) are None if they are a function of the hidden states; the caller then asks `logits` for them.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H); called only where `read` returned none."""
        ...

    def new_cache(self) -> RowCache | None:
        """Return a new, empty decoding cache, or None if the model has none; several are in use side by side.

        A cache returns hidden states and logits at the last token of each row, and is never read with gradients on.
        Without a cache, each new token takes a `read` of the whole row.
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights, whose versions a `RowCache` compares to notice a change."""
        ...


class CachedModel(LanguageModel, Protocol):
    """A language model whose keys and values a `PrefixCache` keeps.

    Attributes:
        takes_new_rows: Whether one forward can read a new row from its start beside rows that grow by one token.
    """

    takes_new_rows: bool

    @property
    def longest(self) -> int | None:
        """The most tokens that the model's tables of positions allow; None where they set no limit."""
        ...

    def prefill(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Cache:
        """Return the keys and values of left-padded rows, (B, T); mask and positions have the same shape."""
        ...


class SequenceScorer(nn.Module, ABC):
    """Base class of a model that values and scores the transitions of minibatches.

    The code that shards it, shares its gradients or splits its minibatches knows
    this class alone, and so does not import the policies.

    Attributes:
        backbone: The language model.
        critic: The critic.
        lagged: The lagged copy of the backbone that `top_p_lag` samples by, or None.
        value_norm: The normalisation of returns, or None.
        autocast: The name of the type that forwards run in, or None for that of the weights.
        shards: The weights' `Shards` where they are spread over several processes, or None.
        most_tokens: The most tokens that an update reads in one forward, set by an out-of-memory error; None before.
    """

    backbone: LanguageModel
    critic: nn.Module
    lagged: nn.Module | None
    value_norm: nn.Module | None
    autocast: str | None
    shards: Any
    most_tokens: int | None

    @property
    @abstractmethod
    def autocast_dtype(self) -> torch.dtype:
        """The type that forwards run in."""

    @abstractmethod
    def chunks(self, batch: SequenceBatch) -> Iterator[Chunk]:
        """Yield a batch in the chunks that the model reads, each in forwards of its own."""

    @abstractmethod
    def evaluate(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, ...]:
        """Return the critic's outputs, log-probabilities and entropies of a batch of N transitions, (N,) each.

        Where the batch's `term` reads another model, its divergences follow, (N,).
        """

    @abstractmethod
    def evaluate_parts(
        self, batch: SequenceBatch, actions: Tensor, n_forwards: int | None = None
    ) -> tuple[Tensor, ...]:
        """Return the results of `evaluate`, computed in one forward per chunk, or in `n_forwards` forwards."""

    @abstractmethod
    def evaluate_chunk(self, chunk: Chunk, actions: Tensor) -> tuple[Tensor, ...]:
        """Return the results of `evaluate` for the n transitions of a chunk, (n,) each, computed in one forward."""


@runtime_checkable
class BackendSpec(Protocol):
    """A small object that pickles and builds a `LanguageModel` of your own; `policy_kwargs` hold it as `lm`.

    `model.save` pickles the spec, and `PPO.load` builds the model again before it copies the saved weights in. So the
    spec holds names and addresses, and no weights, connections or secrets.

    Example:
        >>> from dataclasses import dataclass
        >>> from agents import BackendSpec
        >>> @dataclass(frozen=True)
        ... class Remote:
        ...     address: str
        ...
        ...     def build_backend(self, vocab_size, n_positions):
        ...         raise NotImplementedError("return an object with the members of LanguageModel")
        >>> isinstance(Remote("localhost:5000"), BackendSpec)
        True
    """

    def build_backend(self, vocab_size: int, n_positions: int) -> LanguageModel:
        """Return the model, for a tokenizer of `vocab_size` tokens and sequences of at most `n_positions` tokens.

        Weights with `requires_grad` are trained, and are float32.

        Raises:
            ValueError: If the model has fewer tokens or positions.
        """


class RowCache(ABC):
    """Base class of decoding caches: a row that grew by exactly one token reuses its state; any other is read anew.

    `growth` compares rows token by token with those of the last read, so that the result depends on the tokens alone,
    not on the caller. `version_of` notices a change of the weights, except for a fused optimizer's steps: call `drop`
    after those (`LMPolicy` does for its own optimizer). `PrefixCache` keeps keys and values; other subclasses keep what
    their model needs.

    Args:
        backbone: The language model.
    """

    def __init__(self, backbone: LanguageModel) -> None:
        self.backbone = backbone
        self.drop()

    def drop(self) -> None:
        """Forget all rows."""
        self.ids: Tensor | None = None  # (B, T) of the last read
        self.lengths: Tensor | None = None  # (B,)
        self.weights: tuple[Tensor, ...] = ()  # collected by the next read: a large model takes milliseconds for it
        self.version = 0

    def read(self, *row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states (B, H) and the logits (B, V) at the last token of each row.

        Args:
            *row: Tokens, (B, T), padded on the right; the length of each row, (B,), where 0 marks a row whose result
                is ignored; and for an encoder-decoder the length of each prompt, (B,).
        """
        try:
            return self._read(*row)
        except BaseException:  # broken off inside a step: some layers hold the new token, others do not
            self.drop()
            raise

    @abstractmethod
    def _read(self, *row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of `read`; call `remember` at the end."""

    def remember(self, ids: Tensor, lengths: Tensor) -> None:
        """Keep the rows just read, for `growth` to compare the next ones with."""
        if self.ids is None:
            self.weights = tuple(self.backbone.parameters())
        self.ids, self.lengths, self.version = ids, lengths, version_of(self.weights)

    def growth(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return by how many tokens each row extends the row of the last read, (B,); -1 if it does not extend it."""
        if self.ids is None or self.lengths is None or len(self.ids) != len(ids) or not self.is_current():
            return torch.full_like(lengths, -1)
        width = min(ids.shape[1], self.ids.shape[1])
        beyond = torch.arange(width, device=ids.device) >= self.lengths[:, None]  # (B, width): past the row's end
        same = ((ids[:, :width] == self.ids[:, :width]) | beyond).all(dim=1)  # (B,)
        return torch.where(same & (lengths <= ids.shape[1]), lengths - self.lengths, -1)

    def is_current(self) -> bool:
        """Return whether the weights are still those of the last read, as far as their versions show."""
        return self.version == version_of(self.weights)

    def has_rows_of(self, *row: Tensor) -> bool:
        """Return whether at least one of the rows (the arguments of `read`) extends its row by one token."""
        return bool((self.growth(*row[:2]) == 1).any())


def version_of(weights: Iterable[Tensor]) -> int:
    """Return a number that grows whenever one of the weights is written in place.

    PyTorch counts writes in `Tensor._version`, for autograd. A fused optimizer's steps are not counted.

    Example:
        >>> weight = torch.zeros(2)
        >>> version_of([weight]), version_of([weight.add_(1)])
        (0, 1)
    """
    return sum(weight._version for weight in weights)
