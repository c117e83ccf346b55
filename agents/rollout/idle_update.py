"""The minibatch of an update that trains nothing, since the rollout has no whole group of samples."""

from __future__ import annotations

import numpy as np
import torch

from ..models.sequences import SequenceBatch
from .ended_episodes import RolloutGroups
from .transitions import SequenceSamples


def idle_samples(
    groups: RolloutGroups | None, is_first: bool, actions: np.ndarray, log_probs: np.ndarray, device: torch.device | str
) -> SequenceSamples:
    """Return a minibatch on which SB3's `train` takes all its steps and changes no weight and no optimizer state.

    SB3 `ppo.PPO.train` and `a2c.A2C.train` log the last minibatch's loss, so that they fail without any minibatch.
    Advantages of 0 are not enough: the entropy bonus, the value loss and the optimizer's momentum would still move the
    weights. Therefore `LMPolicy.evaluate_actions` runs no model on this minibatch, but returns its `stand_in`, numbers
    that depend on no weight. All gradients stay None, and torch's optimizers skip weights without a gradient.

    Ratios are 1, and all losses 0 except that of the entropy, which is estimated from the rollout, so that its logged
    curve has no gap.

    Args:
        groups: The groups of the rollout, none of which is trained now.
        is_first: Whether it is the first such minibatch of an update, which may warn.
        actions: The actions of the rollout, (T, B).
        log_probs: Their log-probabilities by the policy, (T, B), in nats.
        device: The device of minibatches.
    """
    assert groups is not None, "only episodes of groups wait"
    if is_first:
        groups.warn_of_idle_update()
    n = actions.size
    old = torch.as_tensor(log_probs.flatten(), device=device)  # (N,)
    zeros, rows = torch.zeros_like(old), np.zeros(n, dtype=np.int64)
    batch = SequenceBatch(torch.zeros((1, 1), dtype=torch.int64, device=device), np.ones(1, dtype=np.int64), rows, rows)
    # Leaves of the graph, since a backward pass needs one.
    batch.stand_in = tuple(numbers.clone().requires_grad_() for numbers in (zeros, old, -old))  # type: ignore[assignment]
    chosen = torch.as_tensor(actions.flatten(), device=device).long()
    return SequenceSamples(batch, chosen, zeros, old, zeros, zeros)
