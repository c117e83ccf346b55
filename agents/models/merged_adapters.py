"""LoRA's adapters merged into copies of the frozen weights while a rollout decodes: one product where there were three.

The frozen weight W, the adapter's A and B, and all their names stay as they are, also inside a decoding step. A layer
that decodes reads W + s B A from a tensor of its own, which neither `parameters()` nor `state_dict()` has, so that
nothing has to be restored, whatever breaks a step off. The tensor is freed when the weights change, hence before an
update needs the memory.

A merged product rounds otherwise than the three. At 135 M parameters in float32, log-probabilities of a rollout differ
from those of its update by 5e-6 on average, and by 4e-6 with adapters apart. 16 bits would round small adapters away:
with weights of 16 bits, and under autocast, adapters stay apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ADAPTER = "default"  # the usual name of an adapter in peft (`mapping.inject_adapter_in_model`)
# Adapters of a layer with n inputs and m outputs cost a token about n + m, a merge n m. The factor is measured: on a
# CPU a merge at 135 M parameters takes the time of the adapters for 550 to 800 tokens, where n m / (n + m) is 348. With
# 1,344 tokens, a rollout of two steps, merging has 1.06x the speed.
MERGE_COST = 2.0
MEMORY_SHARE = 1 / 8  # of the memory of the weights' device: the most that the merged copies may take

# Layers are called by the model, which has no argument to pass this through.
_is_worth_it: ContextVar[Callable[[], bool]] = ContextVar("is_worth_it", default=bool)


class MergingForward:
    """The forward of a linear layer with an adapter, which inside `merged_adapters` reads the merged weight.

    Wherever the merged weight would not give the same result up to rounding, the layer computes as peft does: with
    gradients, under autocast, inside `torch.compile`, with adapters switched off, and if the layer around the frozen
    weight has hooks, a forward of its own, or a weight that is not float32.

    Args:
        layer: A `peft.tuners.lora.layer.Linear`.

    Attributes:
        merged: The merged weight, (outputs, inputs), of the weights in `_key`; None until it is needed.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        parts = (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B)
        self._sources: list[nn.Module] = [layer.base_layer, *(part[ADAPTER] for part in parts if ADAPTER in part)]
        self.merged: Tensor | None = None
        self._key: tuple[Any, ...] = ()

    def __call__(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output."""
        is_apart = torch.compiler.is_compiling() or not _is_worth_it.get()() or torch.is_grad_enabled()
        weight = None if is_apart or args or kwargs else self._weight(states)
        if weight is None:
            return cast("Tensor", type(self.layer).forward(self.layer, states, *args, **kwargs))
        return nn.functional.linear(states, weight, self.layer.base_layer.bias)

    @property
    def size(self) -> tuple[int, int]:
        """The number of inputs and of outputs."""
        return self.layer.in_features, self.layer.out_features

    @property
    def device(self) -> torch.device:
        """The device of the frozen weight."""
        return cast("torch.device", self.layer.base_layer.weight.device)

    def release(self) -> None:
        """Free the merged weight."""
        self.merged, self._key = None, ()

    def _weight(self, states: Tensor) -> Tensor | None:
        """Return the merged weight; None if the layer must compute as peft does."""
        if self.layer.disable_adapters or torch.is_autocast_enabled(states.device.type):
            return None
        # A write in place raises the version; a tensor that takes the place of another has its own address.
        weights = [module._parameters.get("weight") for module in self._sources]
        key = tuple(None if weight is None else (weight._version, weight.data_ptr()) for weight in weights)
        if key != self._key:
            self.merged, self._key = self._merge(), key
        return self.merged if states.dtype == torch.float32 else None

    def _merge(self) -> Tensor | None:
        base = self.layer.base_layer
        is_plain = (
            type(base).forward in (nn.Linear.forward, Conv1D.forward)
            and vars(base).keys().isdisjoint(("forward", "_hf_hook"))  # accelerate's hooks move weights
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and all(
                type(module._parameters.get("weight")) is nn.Parameter  # neither a shard nor computed
                and module._parameters["weight"].dtype == torch.float32  # type: ignore[union-attr]
                for module in self._sources
            )
        )
        if not is_plain or self.layer.active_adapters != [ADAPTER] or self.layer.merged:
            return None
        merged = merged_weight(self.layer, base.weight)
        return merged.t() if isinstance(base, Conv1D) else merged  # GPT-2's W is transposed


def merged_weight(layer: Any, base: Tensor) -> Tensor:
    """Return W + s B A of an adapted layer, in a new tensor of float32; `base` is its W.

    With DoRA each row of that sum is scaled to its trained magnitude.
    """
    # Not in place: of experts, peft leaves out the dimension of a single one.
    merged = base.detach().float() + layer.get_delta_weight(ADAPTER).detach()
    if ADAPTER in layer.lora_magnitude_vector:
        axis = 0 if layer.fan_in_fan_out else 1  # of the inputs: GPT-2's W is transposed
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.detach()
        merged *= (magnitude / merged.norm(dim=axis)).unsqueeze(axis)
    return merged


def let_merge(layers: Sequence[Any]) -> None:
    """Give linear layers with an adapter a forward that can read merged weights."""
    for layer in layers:
        vars(layer)["forward"] = MergingForward(layer)


def keep_apart(model: nn.Module) -> None:
    """Have a model's layers compute as peft does again: for weights that are spread over processes."""
    for forward in merging_forwards(model):
        del vars(forward.layer)["forward"]


def merging_forwards(model: nn.Module) -> list[MergingForward]:
    """Return the forwards of a model's layers that can read merged weights."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, MergingForward)]


def tokens_to_merge(forwards: Sequence[MergingForward]) -> float:
    """Return how many tokens must be read from the same weights for a merge to pay; infinity if it never does.

    A merge adds a copy of the adapted weights. It is not made if all copies take more than `MEMORY_SHARE` of the
    device's memory.

    Example:
        >>> tokens_to_merge([])
        inf
    """
    if not forwards:
        return math.inf
    sizes = [forward.size for forward in forwards]
    merge = sum(n_inputs * n_outputs for n_inputs, n_outputs in sizes)
    if 4 * merge > MEMORY_SHARE * _memory(forwards[0].device):
        return math.inf
    return MERGE_COST * merge / sum(n_inputs + n_outputs for n_inputs, n_outputs in sizes)


def _memory(device: torch.device) -> int:
    """Return the bytes of a device's memory, used or not: what is free differs from run to run."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def merged_adapters(is_worth_it: Callable[[], bool]) -> Iterator[None]:
    """Have layers with a `MergingForward` read merged weights inside, whenever `is_worth_it` returns True."""
    token = _is_worth_it.set(is_worth_it)
    try:
        yield
    finally:
        _is_worth_it.reset(token)
