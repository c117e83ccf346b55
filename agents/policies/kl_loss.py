"""The divergence from a reference as a term of the loss, beside the terms that PPO's unmodified `train` computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.sequences import Chunk, PartReader


class KLLoss:
    """The term `coef` times the divergence of each token's distribution, which a `KLPenalty` adds to the loss.

    Args:
        read: Returns the reader of the reference at a chunk, whose divergences are exact. None: the term is k2 of the
            sampled tokens, by the log-probabilities that the buffer keeps.

    Attributes:
        coef: The coefficient of the coming update, in loss per nat.
    """

    def __init__(self, read: Callable[[Chunk], PartReader] | None) -> None:
        self.read = read
        self.coef = 0.0
        self.values: list[Tensor] = []  # of each minibatch since the last `mean`: the mean term of a token, in nats

    def mean(self) -> float | None:
        """Return the mean of the term over the minibatches of the last update, in nats a token; None without any."""
        values, self.values = self.values, []
        return float(torch.stack(values).mean()) if values else None

    def term(self, weights: np.ndarray, old: np.ndarray, reference: np.ndarray, device: torch.device | str) -> KLTerm:
        """Return the term of a minibatch of N tokens.

        Args:
            weights: The weight of each token in the policy loss, (N,): its aggregation, and an engine's ratio.
            old: The log-probabilities of the tokens when they were sampled, (N,), in nats.
            reference: Those by the reference, (N,), in nats; infinity for tokens that were sampled without a penalty.
            device: The device of the minibatch.
        """
        if self.read is None:  # such tokens have none now either
            is_known = np.isfinite(reference)
            weights, reference = np.where(is_known, weights, 0.0), np.where(is_known, reference, old)
        numbers = (torch.as_tensor(array.astype(np.float32), device=device) for array in (weights, old, reference))
        return KLTerm(self, *numbers)


@dataclass(frozen=True)
class KLTerm:
    """The term of a minibatch: coef * mean(weights * divergences), over its N tokens.

    It reaches the gradient through the log-probabilities that the policy returns, whose backward pass also runs that of
    the term, whatever the loss does with them. So it needs no coefficient of SB3's own terms, and no figure of these
    contains it: neither `train/loss` nor any other of SB3's.

    Args:
        loss: The term of all minibatches.
        weights: As in `KLLoss.term`, (N,).
        old: As in `KLLoss.term`, (N,).
        reference: As in `KLLoss.term`, (N,).
    """

    loss: KLLoss
    weights: Tensor
    old: Tensor
    reference: Tensor

    def read(self, chunk: Chunk) -> PartReader | None:
        """Return the reader of the reference at a chunk, if divergences are exact."""
        return None if self.loss.read is None else self.loss.read(chunk)

    def added_to(self, results: Sequence[Tensor], log_probs: Tensor) -> Tensor:
        """Return log-probabilities, (N,), whose backward pass runs that of the term, given the policy's results."""
        if self.loss.read is not None:
            divergences = results[3]
        else:  # tokens were sampled by the old policy
            ratios = (results[1].detach() - self.old).exp()
            divergences = ratios * (results[1] - self.reference).square() / 2
        self.loss.values.append(divergences.detach().mean())
        term = self.loss.coef * (self.weights * divergences).mean()
        return _WithTerm.apply(log_probs, term)


class _WithTerm(torch.autograd.Function):
    """The identity of the first input; the backward pass gives the second the gradient that a term of the loss has."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, term: Tensor) -> Tensor:
        ctx.gradient = torch.ones_like(term)
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.gradient
