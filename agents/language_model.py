"""What the policy needs of a language model; `Backbone` is the one for transformers' models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .row_cache import RowCache


class LengthError(ValueError):
    """Texts are longer than a model can read.

    Args:
        fact: What was expected, and what is there.
        cure: What may be changed.
        excess: How many tokens fewer would have to be written; None where the prompts alone are too long.
    """

    def __init__(self, fact: str, cure: str, excess: int | None) -> None:
        super().__init__(fact, cure, excess)
        self.fact, self.cure, self.excess = fact, cure, excess

    def __str__(self) -> str:
        """Return both as a sentence."""
        return f"{self.fact}: {self.cure}."


class LanguageModel(Protocol):
    """A language model that is read at chosen places: an `nn.Module` that need not be transformers'.

    This is all that actor, critic, buffers, KL penalty, evaluation and checkpoints ask of a model. What looks inside
    one of transformers (`export`, adapters, some checks of the doctor) says so where the model is another.

    A batch is (B, T) tokens, padded on the right, without an attention mask. What is read at a place may depend on no
    token after it, and so on no padding; it must not be random. Gradients flow from hidden states and logits to every
    parameter with `requires_grad`, once (`torch.autograd.grad`, no second derivative), and a forward may be repeated.
    Parameters and buffers are what checkpoints and `model.save` keep. A copy (`copy.deepcopy`) has weights of its own.

    Attributes:
        vocab_size: How many tokens can be sampled: the columns of the logits.
        hidden_size: The size of the hidden states, which the critic reads.
        is_encoder_decoder: Whether reads want, behind `cols` and in a cache behind the lengths, how many tokens of each
            row are the prompt's, (B,).

    Example:
        >>> from agents.backbone import Backbone
        >>> from agents.language_model import LanguageModel
        >>> def largest_token(lm: LanguageModel) -> int:
        ...     return lm.vocab_size - 1
    """

    vocab_size: int
    hidden_size: int
    is_encoder_decoder: bool

    @property
    def takes_cache(self) -> bool:
        """Whether a cache may be read now; False while layers compute their activations again."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model lives: tokens are given there, hidden states and logits come from there."""
        ...

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        """Raise ValueError where `n_tokens`, and `n_written` behind them, are more than the model can read.

        As a `LengthError` it says how many tokens fewer would do, so that lengths nobody chose can be cut to them.
        """
        ...

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, H) and logits (N, V); the inputs are those of `read`."""
        ...

    def read(self, ids: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (N, H) at the places (rows, cols) of `ids` (B, T).

        The logits (N, V) come with them where they do not follow from the hidden states, else None and `logits` is
        asked.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H), where `read` gave none."""
        ...

    def new_cache(self) -> RowCache | None:
        """Return what decodes one token a row from what it holds of the tokens before; several are in use at a time.

        Its results are those of `read` at each row's last token, and it is never read where gradients are on. None
        where there is no such thing: each token is then a read of the whole row.
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the weights; a `RowCache` looks at their versions to notice that they were written."""
        ...


@runtime_checkable
class BackendSpec(Protocol):
    """Something small that pickles and builds a `LanguageModel` of one's own; `policy_kwargs` hold it as `lm`.

    The file that `model.save` writes has it, and `PPO.load` builds it again before the saved weights are copied in: it
    holds names and addresses, no weights, connections or secrets.
    """

    def build_backend(self, vocab_size: int, n_positions: int) -> LanguageModel:
        """Return the model, for a tokenizer of `vocab_size` tokens and texts of at most `n_positions`.

        It decides what is trained by its weights' `requires_grad`; trained ones are float32.

        Raises:
            ValueError: If the model has fewer tokens or positions than that.
        """
