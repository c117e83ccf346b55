"""The step that trains the critic alone on the first rollouts."""

from __future__ import annotations

from typing import Any, cast

from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..distributed.sharding import released
from ..policies.flat import FlatLMPolicy
from ..policies.lm_policy import LMPolicy
from ..rollout.buffer import SequenceRolloutBuffer
from .step import RolloutStep, sequence_buffer


def weights_beside_critic(policy: LMPolicy) -> list[nn.Parameter]:
    """Return the trained weights of a policy without those of its critic; a trunk that they share is the policy's.

    All processes must call it if the weights are sharded.
    """
    with released(policy.lm):  # the optimizer has the shards
        critic_weights = set(policy.lm.critic.parameters())
    # The optimizer has all trained weights, those that an earlier warm-up took out of the gradient included.
    optimized = [weight for group in policy.optimizer.param_groups for weight in group["params"]]
    return [weight for weight in optimized if weight not in critic_weights]


class CriticWarmup(RolloutStep):
    """Trains the critic alone on the first rollouts, so that no fresh value head decides the policy's first advantages.

    Before the update of each of these rollouts the policy's weights are taken out of the gradient (`requires_grad`):
    the weights and their optimizer state stay the same bit for bit, and the backward pass costs less. A trunk that
    policy and critic share counts as the policy's; then only the value head learns. With sharded weights, whose
    gradients `fully_shard` averages in any case, each gradient is forgotten as it arrives, and the backward pass costs
    what it always does.

    Rollouts are counted from the first time that the step is attached to a model. A checkpoint keeps the count. A file
    written by `model.save` does not: a loaded model to which the step is attached is warmed up again, which
    `CriticWarmup(0)` avoids.

    Args:
        n_rollouts: The number of rollouts.

    Raises:
        ValueError: If `n_rollouts` is negative; when attached, with TRPO, whose update differentiates the policy in any
            case.

    Example:
        >>> from agents import CriticWarmup
        >>> callback = CriticWarmup(4)  # model.learn(100_000, callback=callback)
    """

    key = "CriticWarmup"

    def __init__(self, n_rollouts: int, verbose: int = 0) -> None:
        super().__init__(verbose)
        if n_rollouts < 0:
            raise ValueError(f"Expected `n_rollouts` to be 0 or more, got {n_rollouts}.")
        self.n_rollouts = n_rollouts
        self.n_done = 0
        self._hooks: list[RemovableHandle] = []  # on sharded weights

    def prepare(self, model: BaseAlgorithm) -> None:
        """Find the policy's weights, and the count of an earlier call of `learn`."""
        for step in sequence_buffer(model).before_returns:
            if isinstance(step, CriticWarmup):
                self.n_done = step.n_done
                step._remove_hooks()
        policy = cast("LMPolicy", model.policy)
        if isinstance(policy, FlatLMPolicy):
            raise ValueError(
                "Expected another algorithm than TRPO with CriticWarmup, got TRPO, which differentiates the policy in "
                "every update. TRPO trains its critic separately; use its argument n_critic_updates."
            )
        self.weights = weights_beside_critic(policy)
        self._is_sharded = policy.lm.shards is not None

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Take the policy's weights out of the coming update's gradient, or put them back in."""
        is_warming = self.n_done < self.n_rollouts
        self._remove_hooks()
        for weight in self.weights:
            if not self._is_sharded:
                weight.requires_grad_(not is_warming)
            elif is_warming:  # `fully_shard` fixes once which weights have a gradient, but calls these hooks
                self._hooks.append(weight.register_post_accumulate_grad_hook(_forget))
            weight.grad = None  # forgets an earlier minibatch: `clip_grad_norm_` and the optimizer skip such weights
        self.n_done += 1

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the number of rollouts so far."""
        return {}, {"n_done": self.n_done}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Continue the count of a checkpoint."""
        self.n_done = meta["n_done"]


def _forget(weight: Tensor) -> None:
    """Drop a gradient that has just been accumulated."""
    weight.grad = None
