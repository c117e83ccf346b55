"""The loss of a minibatch whose rows are shared among several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.world import world


def shared_loss(model: nn.Module, loss_of: Callable[[list[int]], Tensor]) -> Callable[[list[int]], Tensor]:
    """Return a function from the rows of a minibatch to their loss, whose backward pass averages over processes.

    Process r of W reads the rows r, r + W, r + 2 W, ...; losses and gradients are those of all rows. All processes must
    call it with the same rows. With one process it is `loss_of` itself.

    Args:
        model: The model that is trained.
        loss_of: A function from rows to the mean of their losses, by the model.
    """
    here = world()
    if here is None:
        return loss_of
    rank, size = here.rank, here.size
    engine = DistributedDataParallel(_Loss(model, loss_of), gradient_as_bucket_view=True)

    def loss(rows: list[int]) -> Tensor:
        own = rows[rank::size]
        # `DistributedDataParallel` averages gradients over W processes: with weights n W / N the average of the means
        # over n rows is the mean over all N. A process without a row reads another's, with the weight 0.
        weighted = engine(own or rows[:1]) * (len(own) * size / len(rows))
        total = weighted.detach().clone()
        dist.all_reduce(total)
        return weighted + (total / size - weighted).detach()  # its value is that of all rows, its gradient our part

    return loss


class _Loss(nn.Module):
    """A module whose forward is a loss, since `DistributedDataParallel` wraps forwards only."""

    def __init__(self, model: nn.Module, loss_of: Callable[[list[int]], Tensor]) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, rows: list[int]) -> Tensor:
        return self.loss_of(rows)
