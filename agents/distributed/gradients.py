"""The gradient of a minibatch that is spread over several processes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.interface import SequenceScorer
from ..models.sequences import SequenceBatch
from .collectives import gather
from .hangs import note_progress
from .world import world


class AgreedTarget(float):
    """A `target_kl` at which all processes stop their update at the same minibatch.

    SB3 `ppo.PPO.train` compares the divergence of this process's minibatch with `1.5 * self.target_kl`. The product is
    minus or plus infinity, so that the comparison comes out as it would for the minibatch of all processes.

    Attributes:
        agreed: The divergence (nats) of the minibatch of all processes; None before the first.

    Example:
        >>> target = AgreedTarget(0.1)
        >>> 1.5 * target, float(target)
        (0.15000000000000002, 0.1)
        >>> target.agreed = 0.2  # of all processes; that of this process is 0.01
        >>> 0.01 > 1.5 * target
        True
    """

    agreed: float | None = None

    # `1.5 * target` calls it first, since the class of the right operand is a subclass of the left operand's.
    def __rmul__(self, factor: float) -> float:
        limit = factor * float(self)
        if self.agreed is None:
            return limit
        return -math.inf if self.agreed > limit else math.inf


class SharedGradient:
    """Evaluation of minibatches whose backward pass gives each process the gradient of all processes' data.

    `DistributedDataParallel` averages the gradients of W processes while they are computed, so that all clip and step
    by the same gradient. SB3's losses are means over the n transitions of one process; the mean over all N is the
    average of the processes' losses with weights n W / N. That weight is the batch's `share`: the gradients of the
    evaluated tensors are multiplied by it. At the first minibatch all processes take the weights of rank 0.

    Args:
        lm: The policy's model.

    Attributes:
        target: The algorithm's `target_kl`, which receives the divergence of every minibatch; None without one.
    """

    def __init__(self, lm: SequenceScorer) -> None:
        self.lm = lm
        self.target: AgreedTarget | None = None
        self._engine: DistributedDataParallel | None = None
        self._trained: list[nn.Parameter] = []

    def evaluate(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, ...]:
        """Return values, log-probabilities and entropies, (N,) each, as `SequenceScorer.evaluate`.

        All processes must call it, and then all of them or none run the backward pass.
        """
        assert batch.share is not None, "a minibatch of the buffer"
        note_progress()
        if self.lm.shards is None:
            results = self._replicated(batch, actions)
            gather("a minibatch", None)  # before the backward pass, in whose collectives no error names a rank
        else:  # `fully_shard` averages gradients itself, but all processes must run the same number of forwards
            n_forwards = gather("the parts of a minibatch", sum(1 for _ in self.lm.chunks(batch)))
            try:
                results = self.lm.evaluate_parts(batch, actions, max(n_forwards))
            except RuntimeError:  # perhaps torch's, whose collectives name no rank
                here = world()
                assert here is not None, "several processes"
                here.watch.check()
                raise
        if self.target is not None:
            self.target.agreed = self._divergence(batch, results[1].detach())
        return tuple(_scaled_gradient(result, batch.share) for result in results)

    def _replicated(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, ...]:
        trained = [weight for weight in self.lm.parameters() if weight.requires_grad]
        # At the first minibatch, and whenever `CriticWarmup` has changed which weights are trained.
        if list(map(id, trained)) != list(map(id, self._trained)):
            with warnings.catch_warnings():  # torch 2.13 renames the option, and older versions lack the new name
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
                self._engine = DistributedDataParallel(
                    _Evaluation(self.lm), broadcast_buffers=False, gradient_as_bucket_view=True
                )
            self._trained = trained
        assert self._engine is not None, "just made"
        return self._engine(batch, actions)

    @staticmethod
    def _divergence(batch: SequenceBatch, log_probs: Tensor) -> float:
        """Return the mean of SB3's estimate of the divergence, exp(r) - 1 - r, over all processes' minibatches."""
        assert batch.share is not None and batch.old_log_probs is not None, "a minibatch of the buffer"
        log_ratio = log_probs - batch.old_log_probs
        own = float((log_ratio.exp() - 1 - log_ratio).mean())
        # With weights n W / N (the shares), the average over W processes is the mean over all N transitions.
        weighted = gather("the divergence", own * batch.share)
        return sum(weighted) / len(weighted)


class _Evaluation(nn.Module):
    """A module whose forward is `evaluate`, since `DistributedDataParallel` wraps forwards only."""

    def __init__(self, lm: SequenceScorer) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, ...]:
        return self.lm.evaluate(batch, actions)


class _ScaledGradient(torch.autograd.Function):
    """The identity, but for a gradient that is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


def _scaled_gradient(values: Tensor, scale: float) -> Tensor:
    """Return the values, whose gradient the backward pass multiplies by `scale`."""
    return _ScaledGradient.apply(values, scale)
