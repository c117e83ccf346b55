"""Value heads: what estimates the return of a prefix from the language model's hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


class CriticSpec(Protocol):
    """Something small that pickles and builds a critic; `policy_kwargs` hold it."""

    def build(self, hidden_size: int) -> nn.Module:
        """Return a module that maps hidden states (N, H) to values (N,)."""


@dataclass(frozen=True)
class SharedCritic:
    """A linear value head on the policy's own trunk, initialised to zero: V = 0 at the start.

    Args:
        detach: Whether the value loss stops at the head, so that it does not train the trunk.

    Example:
        >>> import torch
        >>> from agents import SharedCritic
        >>> SharedCritic().build(hidden_size=8)(torch.ones(3, 8)).tolist()
        [0.0, 0.0, 0.0]
    """

    detach: bool = False

    def build(self, hidden_size: int) -> nn.Module:
        """Return the value head."""
        return ValueHead(hidden_size, self.detach)


class ValueHead(nn.Module):
    """A zero-initialised linear map from a hidden state to a value; see `SharedCritic`."""

    def __init__(self, hidden_size: int, detach: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.detach = detach

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the values (N,) of hidden states (N, H), float32."""
        hidden = hidden.detach() if self.detach else hidden
        # Under autocast some models end in 16 bits; the head's weights are float32.
        return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1).float()
