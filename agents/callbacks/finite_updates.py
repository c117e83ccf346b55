"""The callback that skips optimizer steps with a NaN or infinity in the gradient, and stops the run after too many."""

from __future__ import annotations

import math
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch.distributed.tensor import DTensor

from ..distributed.collectives import gather
from ..distributed.sharding import local
from ..errors import NumericsError


class FiniteUpdates(BaseCallback):
    """Skips optimizer steps whose gradient has a NaN or an infinity: weights and optimizer state stay as they are.

    `train/skipped_updates` logs their number per rollout. `patience` skipped steps in a row raise `NumericsError`; the
    run's last checkpoint is from before them. A loss that is not finite in `patience` rollouts in a row raises it, too:
    if each entry of the gradient is finite but its norm overflows, clipping turns the gradient into zero, and nothing
    is learned.

    It hooks into the optimizer, so that the algorithm stays unmodified. TRPO updates its policy without the optimizer:
    there only the critic's steps are checked.

    Args:
        patience: The number of steps, or rollouts, in a row after which to stop.

    Raises:
        ValueError: If `patience` is below 1.

    Example:
        >>> from agents import FiniteUpdates
        >>> callback = FiniteUpdates()  # model.learn(100_000, callback=callback)
    """

    def __init__(self, patience: int = 3) -> None:
        super().__init__()
        if patience < 1:
            raise ValueError(f"Expected `patience` to be at least 1, got {patience}.")
        self.patience = patience

    def _on_training_start(self) -> None:
        self.in_a_row, self.skipped, self.has_trained, self.bad_losses = 0, 0, False, 0
        self.handle = self.model.policy.optimizer.register_step_pre_hook(self._check_gradients)

    def _check_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        # A sum is not finite if a NaN or an infinity is in it: one pass over the gradients, and one number for each.
        sums = [local(weight.grad).sum() for weight in weights]
        is_finite = not sums or bool(torch.stack([total.float().to(sums[0].device) for total in sums]).isfinite().all())
        if any(isinstance(weight, DTensor) for weight in weights):  # each process has seen its own shards only
            is_finite = all(gather("finite gradients", is_finite))
        if is_finite:
            self.in_a_row = 0
            return
        for weight in weights:
            weight.grad = None  # torch's optimizers skip a weight without a gradient
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row >= self.patience:
            raise NumericsError(
                f"Expected finite gradients, got {self.in_a_row} updates in a row with a NaN or infinity, after "
                f"{self.model.num_timesteps} tokens. Try a lower learning rate, a smaller reward (shaping.clip), or "
                "autocast off; the last checkpoint is from before."
            )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.has_trained:
            self.logger.record("train/skipped_updates", self.skipped)
            self._check_losses()
        self.skipped, self.has_trained = 0, True

    def _check_losses(self) -> None:
        """Count rollouts in a row with a loss that is not finite, as SB3's `train` recorded it."""
        values = self.logger.name_to_value
        losses = {name: value for name, value in values.items() if name.startswith("train/") and name.endswith("loss")}
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        self.bad_losses = self.bad_losses + 1 if bad else 0
        if self.bad_losses >= self.patience:
            raise NumericsError(
                f"Expected finite losses, got {bad} in {self.bad_losses} rollouts in a row, after "
                f"{self.model.num_timesteps} tokens: nothing is learned. Try smaller rewards (shaping.clip, "
                "shaping.scale)."
            )

    def _on_training_end(self) -> None:
        self.logger.record("train/skipped_updates", self.skipped)
        self.handle.remove()
