"""A minibatch in parts that fit into memory: where they do not, they are halved and the minibatch is repeated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sequences import SequenceBatch

if TYPE_CHECKING:
    from .actor_critic import LMActorCritic

Result = TypeVar("Result")


def evaluate_in_memory(lm: LMActorCritic, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, ...]:
    """Score the actions of a minibatch as `LMActorCritic.evaluate`, to be differentiated once.

    An out-of-memory error, in this forward or in the backward that follows, halves the most tokens that are read at a
    time (`lm.most_tokens`, from then on), and forward or backward is done again, from the same random state. With a
    bound the forward keeps nothing, and is repeated in the backward, part by part: the same gradient. PPO, MaskablePPO
    and A2C score by it; TRPO differentiates twice and reads its rollout another way.

    Args:
        lm: What scores.
        batch: Sequences with N transitions.
        actions: The tokens taken, (N,).

    Raises:
        torch.OutOfMemoryError: If a single sequence does not fit; the message says what to do.
    """
    weights = [weight for weight in lm.parameters() if weight.requires_grad]
    return _Evaluate.apply(Minibatch(lm, batch, actions, weights), *weights)


class _Evaluate(torch.autograd.Function):
    """The minibatch as one operation on the weights, so that both of its passes can be repeated."""

    @staticmethod
    def forward(ctx: Any, minibatch: Minibatch, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.minibatch = minibatch
        ctx.set_materialize_grads(False)
        return minibatch.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.minibatch.backward(gradients))


class Minibatch:
    """A minibatch that is scored, and differentiated, in as many parts as memory asks for.

    Args:
        lm: What scores.
        batch: Sequences with N transitions.
        actions: The tokens taken, (N,).
        weights: What is differentiated by.
    """

    def __init__(self, lm: LMActorCritic, batch: SequenceBatch, actions: Tensor, weights: Sequence[Tensor]) -> None:
        self.lm, self.batch, self.actions, self.weights = lm, batch, actions, weights
        self.random = RandomState.now(batch.tokens.device)
        self.graph: tuple[Tensor, ...] | None = None  # of the whole, where there is no bound

    def forward(self) -> tuple[Tensor, ...]:
        """Return what `LMActorCritic.evaluate` does, without a graph."""
        return self._repeat(self._forward)

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradient of each weight, given those of the three results."""
        with torch.random.fork_rng(self.random.devices):
            return self._repeat(lambda: self._backward(gradients))

    def _forward(self) -> tuple[Tensor, ...]:
        if self._is_bounded:
            return self.lm.evaluate_parts(self.batch, self.actions)
        with torch.enable_grad():
            self.graph = self.lm.evaluate_parts(self.batch, self.actions)
        return tuple(result.detach() for result in self.graph)

    def _backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        graph, self.graph = self.graph, None
        if graph is not None:
            return self._differentiate(graph, gradients)
        self.random.restore()  # as the forward began
        total: list[Tensor | None] = [None] * len(self.weights)
        for chunk in self.batch.chunks(self.lm.most_tokens):
            places = torch.as_tensor(chunk.transitions, device=self.actions.device)
            with torch.enable_grad():
                results = self.lm.evaluate_chunk(chunk, self.actions[places])
            part = self._differentiate(results, [None if one is None else one[places] for one in gradients])
            del results
            total = [_sum(*pair) for pair in zip(total, part, strict=True)]
        return total

    def _differentiate(self, results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = [(result, gradient) for result, gradient in zip(results, gradients, strict=True)]
        used = [(result, gradient) for result, gradient in pairs if result.requires_grad and gradient is not None]
        if not used:
            return [None] * len(self.weights)
        outputs, outer = zip(*used, strict=True)
        return list(torch.autograd.grad(outputs, self.weights, outer, allow_unused=True))

    @property
    def _is_bounded(self) -> bool:
        return self.lm.most_tokens is not None or self.batch.micro_batch_tokens is not None

    def _repeat(self, work: Callable[[], Result]) -> Result:
        """Do some work, in smaller parts while memory does not do."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Only here is the error gone, which holds on to the tensors of the attempt.
            self.graph = None
            self._halve(reason)
            self.random.restore()

    def _halve(self, reason: str) -> None:
        shapes = [tuple(chunk.ids.shape) for chunk in self.batch.chunks(self.lm.most_tokens)]
        several = [n_rows * width for n_rows, width in shapes if n_rows > 1]
        if not several:
            n_weights = sum(weight.numel() for weight in self.weights)
            raise torch.OutOfMemoryError(
                f"Expected memory for an update of one sequence of {max(width for _, width in shapes)} tokens and "
                f"{n_weights:,} trained weights, got: {reason} Three knobs: gradient_checkpointing=True keeps fewer "
                "activations; train=LoRA(...) or LastLayers(n) trains fewer weights; a smaller max_new_tokens or "
                "max_prompt_tokens makes sequences shorter."
            )
        self.lm.most_tokens = max(several) // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        warnings.warn(
            f"Out of memory with {max(several)} tokens at a time: the update is repeated with {self.lm.most_tokens}, "
            f"and so are those that follow. To begin with it, set micro_batch_tokens={self.lm.most_tokens}. ({reason})",
            stacklevel=2,
        )


class RandomState(NamedTuple):
    """Where torch's generators stand."""

    cpu: Tensor
    devices: list[torch.device]  # those beside the CPU
    others: list[Tensor]

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Return the state of the CPU's generator and, where it has one, the device's."""
        devices = [device] if device.type == "cuda" else []
        return cls(torch.get_rng_state(), devices, [torch.cuda.get_rng_state(one) for one in devices])

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.others, strict=True):
            torch.cuda.set_rng_state(state, device)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total + part
