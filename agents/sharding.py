"""Weights that are spread over the processes of a job: PyTorch's `fully_shard` under an unmodified algorithm."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from stable_baselines3.common.utils import get_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone import Backbone
from .critic import TrunkCritic, ValueHead
from .distributed import gather, offer_help, take_turn
from .trainable import is_placed
from .world import is_main_process, world

if TYPE_CHECKING:
    from .actor_critic import LMActorCritic

Read: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Sharded:
    """Spread weights, gradients and optimizer over the processes of a job (FSDP2; Zhao et al., 2023, section 3).

    Each process keeps 1/W of every tensor of policy and critic, and of the optimizer's. In the update a transformer
    layer's weights are gathered while it is computed; their gradients are averaged where their shard is. Numbers are
    those of `DistributedDataParallel`, up to rounding; `autocast` gathers weights in 16 bits and averages gradients
    in 32. Alone in its process a policy is not sharded. `accelerate launch --use_fsdp --fsdp_version 2` asks for
    `Sharded()` without a word in the script, with its `--fsdp_offload_params`.

    Args:
        gather: Whether each process holds all weights, and keys and values of its own lanes, during a rollout. False
            gathers a layer at a time there, too, for weights that do not fit (embeddings and heads stay together): in
            lock-step, since every process must take part in each forward of any other; one that has none of its own
            runs one of a few tokens.
        offload: Keep shards and optimizer in the memory of the host; the update's step is computed there.
        device: As the algorithm's.

    Raises:
        ValueError: When the policy is built, if it has what cannot be sharded; the message says which.

    Example:
        >>> from agents import Sharded
        >>> policy_kwargs = dict(lm="./my-gpt2", shard=Sharded())
    """

    gather: bool = True
    offload: bool = False
    device: str = "auto"

    @classmethod
    def asked_for(cls) -> Sharded | None:
        """Return what `accelerate launch` has put into the environment; None where it has not.

        Raises:
            ValueError: If it asks for the first version of FSDP, which this is not.
        """
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"):
            return None
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("Expected --fsdp_version 2 beside --use_fsdp, got 1: only `fully_shard` is supported.")
        return cls(offload=os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")


class Shards:
    """What keeps a policy's weights spread, and brings them together for those who read them.

    While they are gathered, the weights can be read by any forward without gradients; otherwise by
    `LMActorCritic.evaluate_parts`, called in all processes. Outside both, the parameters are `DTensor`s.

    Args:
        lm: What is sharded, in place: before its optimizer is built, and with the same weights in all processes.
        spec: How.
    """

    def __init__(self, lm: LMActorCritic, spec: Sharded) -> None:
        here = world()
        assert here is not None, "several processes"
        self._backbone = _checked(lm, spec)
        self.lm, self.spec, self.is_gathered = lm, spec, False
        self.device = get_device(spec.device)
        self.mesh = init_device_mesh(self.device.type, (here.size,))
        self.placements = (Shard(0),)  # what `fully_shard` does
        self._is_helping = False
        self._reads: list[Read] = []  # of the trunks, where they take turns
        self._plain = _without_weights(lm)
        precision = MixedPrecisionPolicy()
        if lm.autocast is not None:  # autocast itself casts what is read
            precision = MixedPrecisionPolicy(lm.autocast_dtype, torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if spec.offload else OffloadPolicy()
        self._layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in reversed(self._layers):
            fully_shard(layer, mesh=self.mesh, mp_policy=precision, offload_policy=offload)
        if isinstance(lm.critic, ValueHead):  # float32 whatever the model is read in
            fully_shard(lm.critic.linear, mesh=self.mesh, offload_policy=offload)
        fully_shard(lm, mesh=self.mesh, mp_policy=precision, offload_policy=offload)
        register_fsdp_forward_method(lm, "evaluate_parts")
        self._modules = [module for module in lm.modules() if isinstance(module, FSDPModule)]
        with torch.no_grad():
            lm(*self._probe())  # the outermost module must be the first to run: it makes the others its own
        self._set(False)
        if not spec.gather:
            self._take_turns()

    def bring(self, is_gathered: bool) -> None:
        """Bring the weights together, to be read without gradients, or keep only this process's shards again.

        All processes must call it.
        """
        if self.is_gathered != is_gathered:
            gather("gathering the weights" if is_gathered else "releasing the weights", None)
            self._set(is_gathered)

    def whole(self) -> LMActorCritic | None:
        """Return a copy without critic that is not sharded, on the host, in the process of rank 0; None in others.

        All processes must call it.
        """
        target = _allocate(self._plain) if is_main_process() else None
        weights = {} if target is None else dict(target.named_parameters())
        with released(self.lm), torch.no_grad():
            for name, weight in self._named_weights():
                full = cast("DTensor", weight).full_tensor()
                if name in weights:
                    weights[name].copy_(full)
        return target

    def twin(self) -> LMActorCritic:
        """Return a frozen copy without critic, sharded as this one is; all processes must call it."""
        copied = _allocate(self._plain)
        copied.shards = Shards(copied, self.spec)
        theirs = dict(copied.named_parameters())
        with released(self.lm), torch.no_grad():
            for name, weight in self._named_weights():
                local(theirs[name]).copy_(local(weight))
        return copied

    def _named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = {name for name, _ in self._plain.named_parameters()}
        return ((name, weight) for name, weight in self.lm.named_parameters() if name in names)

    def _set(self, is_gathered: bool) -> None:
        if not is_gathered:
            # Reshards all, and forgets the order of a rollout's forwards, which is another in each process and by
            # which the backward pass would choose what to gather ahead.
            cast("FSDPModule", self.lm).reset_iter_state()
        for module in self._modules:
            stays = is_gathered and (self.spec.gather or module not in self._layers)
            # In the update the outermost stays whole until its gradient is there, as `fully_shard` has it.
            module.set_reshard_after_forward(not stays and module is not self.lm, recurse=False)
            if stays:
                module.unshard()
        self.is_gathered = is_gathered

    def _probe(self) -> tuple[Any, ...]:
        return tuple(place.to(self.device) for place in self._backbone.probe_places())

    def _take_turns(self) -> None:
        """Have each forward of a trunk wait for the other processes to take part in it."""
        trunks: list[tuple[nn.Module, Read]] = [(self._backbone.model.base_model, self._backbone.read)]
        if isinstance(self.lm.critic, TrunkCritic):
            trunks.append((self.lm.critic.trunk, self.lm.critic.read))
        for trunk, read in trunks:
            name = offer_help(self, partial(Shards._help, trunk=len(self._reads)))
            trunk.register_forward_pre_hook(lambda *_, name=name: self._wait_for_turn(name))
            self._reads.append(read)

    def _wait_for_turn(self, name: str) -> None:
        if not self._is_helping and not torch.is_grad_enabled():  # an update's forwards are as many everywhere
            take_turn(name)

    @torch.no_grad()
    def _help(self, trunk: int) -> None:
        self._is_helping = True
        try:
            Context().run(self._reads[trunk], *self._probe())  # whatever step of its own this process is in
        finally:
            self._is_helping = False


def gathered(lm: LMActorCritic) -> AbstractContextManager[None]:
    """Within it, the weights can be read without gradients; where they are sharded, all processes must call it."""
    return _brought(lm, True)


def released(lm: LMActorCritic) -> AbstractContextManager[None]:
    """Within it, parameters that are sharded are `DTensor`s; all processes must call it."""
    return _brought(lm, False)


@contextmanager
def _brought(lm: LMActorCritic, is_gathered: bool) -> Iterator[None]:
    if lm.shards is None:
        yield
        return
    before = lm.shards.is_gathered
    lm.shards.bring(is_gathered)
    try:
        yield
    finally:
        lm.shards.bring(before)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is sharded; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is whole in each process sharded as another one; one that is sharded already as it is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    device = like.device_mesh.device_type
    return distribute_tensor(tensor.to(device), like.device_mesh, like.placements, src_data_rank=None)


def _without_weights(lm: LMActorCritic) -> LMActorCritic:
    """Return a frozen copy, without critic, whose parameters have a shape and no memory."""
    empty = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), False) for weight in lm.parameters()}
    return copy.deepcopy(lm, {**empty, id(lm.critic): nn.Identity()}).eval()


def _allocate(plain: LMActorCritic) -> LMActorCritic:
    """Return a copy on the host whose parameters hold anything yet."""
    empty = {id(weight): nn.Parameter(torch.empty_like(weight, device="cpu"), False) for weight in plain.parameters()}
    return copy.deepcopy(plain, cast("dict[int, Any]", empty))


def _checked(lm: LMActorCritic, spec: Sharded) -> Backbone:
    """Return the backbone of what can be sharded, or say why it cannot."""
    backbone, reason = lm.backbone, None
    if not isinstance(backbone, Backbone):
        reason = f"a {type(backbone).__name__}, whose layers are not transformers'"
    elif lm.lagged is not None:
        reason = "top_p_lag, whose copy follows the policy's whole weights"
    elif lm.value_norm is not None and lm.value_norm.keeps_values:
        reason = "value_norm='popart', which rewrites the value head between updates; use 'norm'"
    elif is_placed(backbone.model):
        reason = "weights that `device_map` or `quantization_config` has placed"
    elif not spec.gather and not any(isinstance(module, GradientCheckpointingLayer) for module in lm.modules()):
        reason = f"a {type(backbone.model).__name__} with gather=False, whose layers cannot be told apart"
    elif not hasattr(FSDPModule, "reset_iter_state"):
        reason = f"torch {torch.__version__}, whose `fully_shard` cannot be reset; 2.13 can"
    elif lm.backbone.is_encoder_decoder and not spec.gather:
        reason = "an encoder-decoder, whose encoder and decoder are not read as often, in lock-step; use gather=True"
    if reason is not None:
        raise ValueError(f"Expected a policy that can be sharded, got {reason}.")
    return cast("Backbone", backbone)
