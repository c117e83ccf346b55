"""Normalised values: a critic that predicts returns in units of their own mean and deviation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .critic import ValueHead
from .distributed import moments
from .world import world

VALUE_NORMS = ("norm", "popart")
DECAY = 0.9  # of the weight of a rollout with each later one
MIN_DEVIATION = 1e-4


class Scale(NamedTuple):
    """A mean and a deviation, in units of reward."""

    mean: float = 0.0
    deviation: float = 1.0

    def of(self, values: np.ndarray) -> np.ndarray:
        """Return float32 values in these units."""
        return ((values - self.mean) / self.deviation).astype(np.float32)


class ValueNorm(nn.Module):
    """Running mean and deviation of returns, in which a critic's outputs and the value loss are measured.

    Rewards of any size give a critic targets of about mean 0 and deviation 1, so that neither its learning rate nor
    `vf_coef` nor `clip_range_vf` depends on them. The statistics are averages over rollouts with exponentially
    decaying weights, the start's zeros taken out (as in MAPPO; Yu et al., 2022, section 5.1). When they move,

    * "norm" leaves the critic as it is: the values it stands for move too, until it has learnt;
    * "popart" rescales its last layer, w' = w s / s' and b' = (b s + m - m') / s', so that they stay (preserving
      outputs precisely; van Hasselt et al., 2016, proposition 1).

    Mean and deviation are buffers: files and checkpoints of the policy hold them.

    Args:
        kind: "norm" or "popart".

    Example:
        >>> import torch
        >>> from agents.value_norm import ValueNorm
        >>> norm = ValueNorm("norm")
        >>> norm.update(torch.tensor([90.0, 110.0]))
        >>> norm.scale(), norm.denormalize(torch.tensor([0.0, 1.0])).tolist()
        (Scale(mean=100.0, deviation=10.0), [100.0, 110.0])
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in VALUE_NORMS:
            raise ValueError(f"Expected `value_norm` to be None or one of {list(VALUE_NORMS)}, got {kind!r}.")
        self.keeps_values = kind == "popart"
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("weight", torch.zeros(()))  # of all rollouts so far: 1 - DECAY^n

    def scale(self) -> Scale:
        """Return the mean and the deviation of returns so far; 0 and 1 before any."""
        return Scale(float(self.mean), float(self._deviation()))

    def denormalize(self, outputs: Tensor) -> Tensor:
        """Return the values, in units of reward, that a critic's outputs stand for."""
        return outputs * self._deviation() + self.mean

    def _deviation(self) -> Tensor:
        return self.variance.sqrt().clamp(min=MIN_DEVIATION)

    @torch.no_grad()
    def update(self, returns: Tensor, last_layer: nn.Linear | None = None) -> None:
        """Take in the returns of a rollout, (N,); with "popart" rescale the critic's last layer accordingly.

        With several processes they are those of all of them.
        """
        mean, deviation = self.mean.clone(), self._deviation()
        self.weight.mul_(DECAY).add_(1 - DECAY)
        share = (1 - DECAY) / self.weight  # of this rollout; 1 for the first
        if world() is None:
            here, spread = returns.mean(), returns.var(correction=0)
        else:
            here, spread = map(returns.new_tensor, moments("returns", returns.cpu().numpy())[1:])
        away = here - self.mean
        # The decaying averages of x and x^2 without their difference, which rounds badly where the mean is large.
        spread = spread + (1 - share) * away.square()
        self.variance.lerp_(spread, share)
        self.mean.add_(share * away)
        if self.keeps_values:
            assert last_layer is not None, "checked when the policy is built"
            last_layer.weight.mul_(deviation / self._deviation())
            last_layer.bias.mul_(deviation).add_(mean - self.mean).div_(self._deviation())


def scales_of(norm: ValueNorm | None, critic: nn.Module, returns: list[np.ndarray]) -> tuple[Scale, Scale]:
    """Bring the statistics up to date with a rollout's returns; return in which units minibatches then are.

    Args:
        norm: The statistics; None where values are in units of reward.
        critic: What predicts values.
        returns: Of each sequence that is trained, (n,) each.

    Returns:
        The scales of old values and of returns.
    """
    if norm is None or (not returns and world() is None):
        return Scale(), Scale()
    assert isinstance(critic, ValueHead), "checked when the policy is built"
    before = norm.scale()
    of_all = np.concatenate([np.zeros(0, dtype=np.float32), *returns])
    norm.update(torch.as_tensor(of_all, device=norm.mean.device), critic.linear)
    # Old values are what the critic puts out before its first step: with "norm" it has not followed.
    return (norm.scale() if norm.keeps_values else before), norm.scale()
