"""The gradient of an update whose data is spread over several processes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .actor_critic import LMActorCritic
from .distributed import gather
from .sequences import SequenceBatch


class AgreedTarget(float):
    """A `target_kl` by which all processes break off their update at the same minibatch, or none.

    PPO compares its own minibatch's divergence with 1.5 times this. The product is what makes that comparison come out
    as it does for the minibatch of all processes, of which `agreed` is the divergence.

    Example:
        >>> target = AgreedTarget(0.1)
        >>> 1.5 * target, float(target)
        (0.15000000000000002, 0.1)
        >>> target.agreed = 0.2  # of all; here it is less
        >>> 0.01 > 1.5 * target
        True
    """

    agreed: float | None = None

    def __rmul__(self, factor: float) -> float:
        limit = factor * float(self)
        if self.agreed is None:
            return limit
        return -math.inf if self.agreed > limit else math.inf


class SharedGradient:
    """Evaluates minibatches so that the backward pass leaves the gradient of all processes' data in each of them.

    `DistributedDataParallel` averages the gradients of W processes while they are computed, so that what clips and
    steps afterwards sees the same in each. The losses are means over a process's own n transitions; that of all N is
    the mean of theirs with weights n W / N, the batch's `share`, by which the gradient of what is evaluated is
    multiplied. The weights are those of rank 0 at the first minibatch.

    Args:
        lm: The policy's model.

    Attributes:
        target: The algorithm's `target_kl`, which is told the divergence of every minibatch; None where it has none.
    """

    def __init__(self, lm: LMActorCritic) -> None:
        self.lm = lm
        self.target: AgreedTarget | None = None
        self._engine: DistributedDataParallel | None = None
        self._trained: list[nn.Parameter] = []

    def evaluate(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `LMActorCritic.evaluate` does; all processes must call it, and then go backward or none."""
        assert batch.share is not None, "a minibatch of the buffer"
        if self.lm.shards is None:
            values, log_probs, entropies = self._replicated(batch, actions)
        else:  # `fully_shard` averages as well, and each of its forwards needs all processes
            n_forwards = gather("the parts of a minibatch", sum(1 for _ in batch.chunks(self.lm.most_tokens)))
            values, log_probs, entropies = self.lm.evaluate_parts(batch, actions, max(n_forwards))
        if self.target is not None:
            self.target.agreed = self._divergence(batch, log_probs.detach())
        return tuple(_scaled_gradient(part, batch.share) for part in (values, log_probs, entropies))  # type: ignore[return-value]

    def _replicated(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trained = [weight for weight in self.lm.parameters() if weight.requires_grad]
        if list(map(id, trained)) != list(map(id, self._trained)):  # the first one, or a `CriticWarmup` is over
            with warnings.catch_warnings():  # torch 2.13 has another name for the option, which older ones lack
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                self._engine = DistributedDataParallel(
                    _Evaluation(self.lm), broadcast_buffers=False, gradient_as_bucket_view=True
                )
            self._trained = trained
        assert self._engine is not None, "just made"
        return self._engine(batch, actions)

    @staticmethod
    def _divergence(batch: SequenceBatch, log_probs: Tensor) -> float:
        """Return the mean of PPO's estimate of the divergence, exp(r) - 1 - r, over the minibatch of all processes."""
        assert batch.share is not None and batch.old_log_probs is not None, "a minibatch of the buffer"
        log_ratio = log_probs - batch.old_log_probs
        own = float((log_ratio.exp() - 1 - log_ratio).mean())
        weighted = gather("the divergence", own * batch.share)
        return sum(weighted) / len(weighted)


class _Evaluation(nn.Module):
    """`evaluate` as a forward, which is what `DistributedDataParallel` wraps."""

    def __init__(self, lm: LMActorCritic) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.lm.evaluate(batch, actions)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


def _scaled_gradient(values: Tensor, scale: float) -> Tensor:
    """Return the same values, whose gradient is multiplied on its way back."""
    return _ScaledGradient.apply(values, scale)
