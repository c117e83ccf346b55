"""The evaluation of a minibatch, repeated in smaller parts after an out-of-memory error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.interface import SequenceScorer
from ..models.sequences import SequenceBatch

Result = TypeVar("Result")


def evaluate_in_memory(lm: SequenceScorer, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, ...]:
    """Score the actions of a minibatch as `LMActorCritic.evaluate` does, with results that can be differentiated once.

    An out-of-memory error, in this forward or in the backward that follows, halves the number of tokens that a forward
    may read (`lm.most_tokens`, for this minibatch and all later ones), and the pass is run again from the same random
    state. With such a bound the forward keeps no activations and is repeated in the backward, part by part, with the
    same gradient. PPO, MaskablePPO and A2C score actions by this function. TRPO differentiates twice, so it scores them
    by `get_distribution`.

    Args:
        lm: The model that scores.
        batch: Sequences with N transitions.
        actions: The tokens taken, (N,).

    Returns:
        Outputs of the critic, log-probabilities, entropies and perhaps divergences, (N,) each.

    Raises:
        torch.OutOfMemoryError: If a single sequence does not fit; the message names the settings that need less.
    """
    weights = [weight for weight in lm.parameters() if weight.requires_grad]
    return _Evaluate.apply(Minibatch(lm, batch, actions, weights), *weights)


class _Evaluate(torch.autograd.Function):
    """A minibatch as one operation on the weights, so that both of its passes can be repeated.

    SB3 `ppo.PPO.train` calls `loss.backward()` itself: only code inside an autograd function can catch an error there.
    """

    @staticmethod
    def forward(ctx: Any, minibatch: Minibatch, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.minibatch = minibatch
        ctx.set_materialize_grads(False)  # the gradient of a result that the loss does not use is None, not zeros
        return minibatch.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.minibatch.backward(gradients))


class Minibatch:
    """A minibatch that is scored and differentiated in parts that fit into memory.

    Args:
        lm: The model that scores.
        batch: Sequences with N transitions.
        actions: The tokens taken, (N,).
        weights: The weights with respect to which it is differentiated.
    """

    def __init__(self, lm: SequenceScorer, batch: SequenceBatch, actions: Tensor, weights: Sequence[Tensor]) -> None:
        self.lm, self.batch, self.actions, self.weights = lm, batch, actions, weights
        self.random = RandomState.now(batch.tokens.device)
        self.graph: tuple[Tensor, ...] | None = None  # the results with their graph, if there is no bound

    def forward(self) -> tuple[Tensor, ...]:
        """Return the results of `LMActorCritic.evaluate`, (N,) each, without a graph."""
        return self._repeat(self._forward)

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradient of each weight, given the gradients of the results, (N,) each."""
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
        self.random.restore()  # the forward is repeated with the random numbers that it drew
        total: list[Tensor | None] = [None] * len(self.weights)
        for chunk in self.lm.chunks(self.batch):
            indices = torch.as_tensor(chunk.transitions, device=self.actions.device)  # (n,)
            with torch.enable_grad():
                results = self.lm.evaluate_chunk(chunk, self.actions[indices])
            outer = [None if gradient is None else gradient[indices] for gradient in gradients]  # (n,) each
            added = self._differentiate(results, outer)
            del results  # the activations, before the next part is read
            total = [_sum(*pair) for pair in zip(total, added, strict=True)]
        return total

    def _differentiate(self, results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = zip(results, gradients, strict=True)
        used = [(result, gradient) for result, gradient in pairs if result.requires_grad and gradient is not None]
        if not used:
            return [None] * len(self.weights)
        outputs, outer = zip(*used, strict=True)
        return list(torch.autograd.grad(outputs, self.weights, outer, allow_unused=True))

    @property
    def _is_bounded(self) -> bool:
        return self.lm.most_tokens is not None or self.batch.micro_batch_tokens is not None

    def _repeat(self, work: Callable[[], Result]) -> Result:
        """Return the result of a pass, repeated with half the tokens per forward after each out-of-memory error."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # Outside of `except`: the error's traceback holds the tensors of the attempt until here.
            self.graph = None
            self._halve(reason)
            self.random.restore()

    def _halve(self, reason: str) -> None:
        chunks = list(self.lm.chunks(self.batch))
        several = [chunk.n_read for chunk in chunks if len(chunk.ids) > 1]
        if not several:
            n_weights = sum(weight.numel() for weight in self.weights)
            raise torch.OutOfMemoryError(
                f"Expected memory for an update of one sequence of {max(chunk.n_read for chunk in chunks)} tokens and "
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
    """The states of torch's generators."""

    cpu: Tensor
    devices: list[torch.device]  # the devices besides the CPU
    others: list[Tensor]  # the state of each of these devices

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Return the states of the CPU's generator and of that of a CUDA device."""
        devices = [device] if device.type == "cuda" else []
        return cls(torch.get_rng_state(), devices, [torch.cuda.get_rng_state(device) for device in devices])

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.others, strict=True):
            torch.cuda.set_rng_state(state, device)


def _sum(total: Tensor | None, added: Tensor | None) -> Tensor | None:
    if total is None or added is None:
        return added if total is None else total
    return total + added
