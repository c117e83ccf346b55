"""Rollouts in which the critic learns and the policy stands still."""

from __future__ import annotations

from typing import Any, cast

from stable_baselines3.common.base_class import BaseAlgorithm

from .buffers import SequenceRolloutBuffer
from .flat_policy import FlatLMPolicy
from .policies import LMPolicy
from .rollout_steps import RolloutStep, sequence_buffer


class CriticWarmup(RolloutStep):
    """Trains the critic alone on the first rollouts, so that the first advantages are not those of a fresh value head.

    Before the update of each of them the policy's weights are taken out of the gradient (`requires_grad`): they, and
    what the optimizer keeps about them, stay the same bit for bit, and the backward pass costs less. A shared trunk is
    the policy's; there only the value head learns.

    Rollouts are counted from when the step is first attached to a model. A checkpoint keeps the count; a file written
    by `model.save` does not, and a loaded model that is given the step is warmed up again: `CriticWarmup(0)` is not.

    Args:
        n_rollouts: How many rollouts.

    Raises:
        ValueError: If `n_rollouts` is negative.

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

    def prepare(self, model: BaseAlgorithm) -> None:
        """Find the policy's weights, and the count of an earlier call of `learn`.

        Raises:
            ValueError: With TRPO, whose update differentiates the policy whatever it is to learn.
        """
        for step in sequence_buffer(model).before_returns:
            if isinstance(step, CriticWarmup):
                self.n_done = step.n_done
        policy = cast("LMPolicy", model.policy)
        if isinstance(policy, FlatLMPolicy):
            raise ValueError(
                "Expected another algorithm than TRPO with CriticWarmup, got TRPO, which differentiates the policy in "
                "every update: it has n_critic_updates, and its critic learns apart from the policy."
            )
        if policy.lm.shards is not None:
            raise ValueError(
                "Expected weights that are whole in each process with CriticWarmup, got sharded ones, of which "
                "`fully_shard` settles once what is trained. Warm up without, and go on from that checkpoint."
            )
        of_critic = set(policy.lm.critic.parameters())
        # The optimizer has what is trained, also where an earlier warm-up has taken it out of the gradient.
        optimized = [weight for group in policy.optimizer.param_groups for weight in group["params"]]
        self.weights = [weight for weight in optimized if weight not in of_critic]

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Take the policy's weights out of the coming update's gradient, or put them back in."""
        for weight in self.weights:
            weight.requires_grad_(self.n_done >= self.n_rollouts)
            weight.grad = None  # of a minibatch before; clipping and optimizer pass over what has none
        self.n_done += 1

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the count."""
        return {}, {"n_done": self.n_done}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Go on from a count."""
        self.n_done = meta["n_done"]
