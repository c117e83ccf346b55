"""Normalised values: a critic that predicts returns in units of their own mean and deviation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed.collectives import moments
from ..distributed.sharding import local, sharded_alone
from ..distributed.world import world
from ..models.critic import ValueHead

VALUE_NORMS = ("norm", "popart")
DECAY = 0.9  # the factor by which each later rollout lowers a rollout's weight: about the last ten rollouts count
MIN_DEVIATION = 1e-4  # in units of reward: keeps returns that are all equal from a division by 0


class Scale(NamedTuple):
    """A mean and a deviation, in units of reward."""

    mean: float = 0.0
    deviation: float = 1.0

    def of(self, values: np.ndarray) -> np.ndarray:
        """Convert values from units of reward to units of this scale, float32."""
        return ((values - self.mean) / self.deviation).astype(np.float32)


class ValueNorm(nn.Module):
    """The running mean and deviation of returns: the units of a critic's outputs and of the value loss.

    Rewards of any size give a critic targets of about mean 0 and deviation 1, so that neither its learning rate nor
    `vf_coef` nor `clip_range_vf` depends on that size. The statistics are averages over rollouts with exponentially
    decaying weights, corrected for the zeros that they start from (as in MAPPO; Yu et al., 2022, section 5.1). When
    they move from mean m and deviation s to m' and s',

    * "norm" leaves the critic as it is, so that its outputs mean other values until it has learnt;
    * "popart" rescales the critic's last layer, w' = w s / s' and b' = (b s + m - m') / s', so that its values stay the
      same (van Hasselt et al., 2016, "preserving outputs precisely", proposition 1).

    Mean and deviation are buffers, which files and checkpoints of the policy hold.

    Args:
        kind: "norm" or "popart".

    Example:
        >>> import torch
        >>> from agents.policies.value_norm import ValueNorm
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
        self.register_buffer("weight", torch.zeros(()))  # the sum of the weights of n rollouts: 1 - DECAY^n

    def scale(self) -> Scale:
        """Return the mean and the deviation of the returns so far; 0 and 1 before the first rollout."""
        return Scale(float(self.mean), float(self._deviation()))

    def denormalize(self, outputs: Tensor) -> Tensor:
        """Return a critic's outputs in units of reward."""
        return outputs * self._deviation() + self.mean

    def _deviation(self) -> Tensor:
        return self.variance.sqrt().clamp(min=MIN_DEVIATION)

    @torch.no_grad()
    def update(self, returns: Tensor, last_layer: nn.Linear | None = None) -> None:
        """Include the returns of a rollout, of all processes, in the statistics.

        Args:
            returns: The returns of this process, (N,), in units of reward.
            last_layer: The critic's last layer, which "popart" rescales.
        """
        if world() is None:
            new_mean, new_variance = returns.mean(), returns.var(correction=0)
        else:
            n, *numbers = moments("returns", returns.cpu().numpy())
            if n == 0:  # no process has a whole group of samples
                return
            new_mean, new_variance = map(returns.new_tensor, numbers)
        mean, deviation = self.mean.clone(), self._deviation()
        self.weight.mul_(DECAY).add_(1 - DECAY)
        share = (1 - DECAY) / self.weight  # the weight of this rollout in the averages; 1 for the first rollout
        shift = new_mean - self.mean
        # Equals the decaying mean of x^2 minus the squared mean of x, which would round badly if the mean is large.
        new_variance = new_variance + (1 - share) * shift.square()
        self.variance.lerp_(new_variance, share)
        self.mean.add_(share * shift)
        if self.keeps_values:
            assert last_layer is not None, "checked when the policy is built"
            change_units(last_layer, mean, deviation, self.mean, self._deviation())

    @torch.no_grad()
    def begin_at(self, mean: float, deviation: float, n_rollouts: int, last_layer: nn.Linear) -> None:
        """Begin with the statistics of rollouts that were made before, and give the last layer their units.

        Args:
            mean: The mean of their returns, in units of reward.
            deviation: The deviation of their returns, in units of reward.
            n_rollouts: The number of rollouts, on which the weight of later ones depends.
            last_layer: The critic's last layer, whose outputs are in units of reward.
        """
        self.mean.fill_(mean)
        self.variance.fill_(deviation**2)
        self.weight.fill_(1 - DECAY**n_rollouts)
        change_units(last_layer, 0.0, 1.0, self.mean, self._deviation())


@torch.no_grad()
def change_units(
    last_layer: nn.Linear,
    mean: Tensor | float,
    deviation: Tensor | float,
    new_mean: Tensor | float,
    new_deviation: Tensor | float,
) -> None:
    """Rescale a critic's last layer, so that outputs in new units mean the same values: van Hasselt et al., 2016.

    If it is sharded, each process rescales its own shard; all processes must call it.
    """
    with sharded_alone(last_layer):
        weight, bias = local(last_layer.weight), local(last_layer.bias)
        old, new, shift = (  # an offloaded shard is on the host, and the statistics are not
            torch.as_tensor(number, device=weight.device) for number in (deviation, new_deviation, mean - new_mean)
        )
        weight.mul_(old / new)
        bias.mul_(old).add_(shift).div_(new)


def scales_of(norm: ValueNorm | None, critic: nn.Module, returns: list[np.ndarray]) -> tuple[Scale, Scale]:
    """Include a rollout's returns in the statistics, and return the units of its minibatches.

    Args:
        norm: The statistics; None if values are in units of reward.
        critic: The critic.
        returns: The returns of each sequence that is trained, (n,) each, in units of reward.

    Returns:
        The scale of old values and the scale of returns.
    """
    if norm is None or (not returns and world() is None):
        return Scale(), Scale()
    assert isinstance(critic, ValueHead), "checked when the policy is built"
    earlier = norm.scale()
    all_returns = np.concatenate([np.zeros(0, dtype=np.float32), *returns])  # (N,)
    norm.update(torch.as_tensor(all_returns, device=norm.mean.device), critic.linear)
    # SB3 `ppo.PPO.train` clips values around the old ones, which must be the critic's outputs before its first step.
    # Under "norm" these are still in the earlier units, since the critic's last layer was not rescaled.
    return (norm.scale() if norm.keeps_values else earlier), norm.scale()
