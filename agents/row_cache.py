"""What decodes one token a row and remembers its rows: which of them are the row of before, and one token more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .language_model import LanguageModel


class RowCache(ABC):
    """Decodes one token a row from what was computed for the tokens before it, where that is of the same row.

    A row may be gone on with only where it is the row read before plus one token (`growth`), whoever calls, so that the
    result is a function of the tokens alone. Weights that were written in place since are noticed where PyTorch counts
    it; where they change otherwise (by a fused optimizer: `LMPolicy` sees to its own), `drop` must be called.
    `PrefixCache` holds keys and values; what else is held is a subclass's own.

    Args:
        backbone: The model.
    """

    def __init__(self, backbone: LanguageModel) -> None:
        self.backbone = backbone
        self.drop()

    def drop(self) -> None:
        """Forget everything."""
        self.ids: Tensor | None = None
        self.lengths: Tensor | None = None
        self.weights = tuple(self.backbone.parameters())
        self.version = self._version()

    def read(self, *row: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, H) and logits (B, V) at the last token of each row.

        Args:
            *row: Tokens, (B, T), padded on the right; how many of them are real, (B,), where a row of none is read for
                nobody; and for an encoder-decoder how many of them are the prompt's, (B,).
        """
        try:
            return self._read(*row)
        except BaseException:  # in the middle of a step: a part of what is held has its token, another has not
            self.drop()
            raise

    @abstractmethod
    def _read(self, *row: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `read` says, and end with `remember`."""

    def remember(self, ids: Tensor, lengths: Tensor) -> None:
        """Take these for the rows read before."""
        self.ids, self.lengths, self.version = ids, lengths, self._version()

    def growth(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return how many tokens each row has more than the row read before it, -1 where it is another, (B,)."""
        if self.ids is None or self.lengths is None or len(self.ids) != len(ids) or self.version != self._version():
            return torch.full_like(lengths, -1)
        width = min(ids.shape[1], self.ids.shape[1])
        beyond = torch.arange(width, device=ids.device) >= self.lengths[:, None]  # (B, width)
        same = ((ids[:, :width] == self.ids[:, :width]) | beyond).all(dim=1)
        return torch.where(same & (lengths <= ids.shape[1]), lengths - self.lengths, -1)

    def has_rows_of(self, *row: Tensor) -> bool:
        """Whether the rows of `read` are held: at least one of as many goes on where it was left."""
        return bool((self.growth(*row[:2]) == 1).any())

    def _version(self) -> int:
        """Return how often the weights were written in place, as PyTorch counts it."""
        return sum(weight._version for weight in self.weights)
