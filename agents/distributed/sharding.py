"""Sharded training: weights spread over the processes of a job by PyTorch's `fully_shard`, under SB3's algorithms."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar, cast

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

from ..models.backbone import Backbone
from ..models.critic import TrunkCritic, ValueHead
from ..models.interface import SequenceScorer
from ..models.layers import trunk_of
from ..models.merged_adapters import keep_apart
from ..models.trainable import is_placed
from .collectives import gather, offer_help, take_turn
from .world import is_main_process, world

Read: TypeAlias = Callable[..., Any]
Scorer = TypeVar("Scorer", bound=SequenceScorer)


@dataclass(frozen=True)
class Sharded:
    """Spread weights, gradients and optimizer over the processes of a job (FSDP2; Zhao et al., 2023, section 3).

    Each of W processes keeps 1/W of every tensor of policy, critic and optimizer. In the update the weights of a
    transformer layer are gathered while it is computed, and each process averages the gradients of its own shard. The
    results are those of `DistributedDataParallel`, up to rounding; `autocast` gathers weights in 16 bits and averages
    gradients in 32. A policy that trains in one process is not sharded. `accelerate launch --use_fsdp --fsdp_version 2`
    has the effect of `Sharded()`, and its `--fsdp_offload_params` that of `offload`, without a change of the script.

    Args:
        gather: Whether each process holds all weights during a rollout, and caches keys and values of its own lanes.
            False gathers one layer at a time in rollouts, too, for weights that do not fit (embeddings and heads stay
            gathered). Processes then run in lock-step, since all must take part in each forward of any of them: a
            process that has no forward to run runs one of a few tokens.
        offload: Whether shards and optimizer stay in the host's memory, where the optimizer's step is then computed.
        device: The device of the algorithm.

    Raises:
        ValueError: When the policy is built, if a part of it cannot be sharded; the message names the part.

    Example:
        >>> from agents import Sharded
        >>> policy_kwargs = dict(lm="./my-gpt2", shard=Sharded())
    """

    gather: bool = True
    offload: bool = False
    device: str = "auto"

    @classmethod
    def asked_for(cls) -> Sharded | None:
        """Return the options that `accelerate launch` has put into the environment; None without `--use_fsdp`.

        Raises:
            ValueError: If they ask for the first version of FSDP, which is not supported.
        """
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"):
            return None
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("Expected --fsdp_version 2 beside --use_fsdp, got 1: only `fully_shard` is supported.")
        return cls(offload=os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")


class Shards(Generic[Scorer]):
    """The sharded weights of a policy, gathered for forwards and released again.

    While the weights are gathered, any forward without gradients can read them. While they are released, the parameters
    are `DTensor`s, and only `SequenceScorer.evaluate_parts` can read them, called in all processes.

    Args:
        lm: The model to shard, in place: before its optimizer is built, with the same weights in all processes.
        spec: The options.
        as_stored: Whether the weights have the type of their file, and become float32 when they are sharded.

    Attributes:
        is_gathered: Whether the weights are gathered now.
    """

    def __init__(self, lm: Scorer, spec: Sharded, as_stored: bool = False) -> None:
        here = world()
        assert here is not None, "several processes"
        self._backbone = _checked(lm, spec)
        self.lm, self.spec, self.is_gathered = lm, spec, False
        self.device = get_device(spec.device)
        self.mesh = init_device_mesh(self.device.type, (here.size,))
        self.placements = (Shard(0),)  # along the first dimension, as `fully_shard` does
        self._is_helping = False
        self._reads: list[Read] = []  # by trunk, a function that runs its forward, for `_help`
        keep_apart(lm)  # a gathered layer has no memory to spare
        self._plain = _without_weights(lm)
        # The config names the type in the end: that of a frozen base in 16 bits stays.
        is_converted = as_stored and self._backbone.model.config.dtype == torch.float32
        if is_converted:
            self._plain.float()
        precision = MixedPrecisionPolicy()
        if lm.autocast is not None:  # autocast casts the inputs itself
            precision = MixedPrecisionPolicy(lm.autocast_dtype, torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if spec.offload else OffloadPolicy()
        self._layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
        # Inner modules first: `fully_shard` takes all parameters of a module, except those of earlier calls.
        for layer in reversed(self._layers):
            fully_shard(layer, mesh=self.mesh, mp_policy=precision, offload_policy=offload)
        if isinstance(lm.critic, ValueHead):  # without `precision`: a value head always computes in float32
            fully_shard(lm.critic.linear, mesh=self.mesh, offload_policy=offload)
        fully_shard(lm, mesh=self.mesh, mp_policy=precision, offload_policy=offload)
        if is_converted:
            lm.float()  # each process its own shards
        register_fsdp_forward_method(lm, "evaluate_parts")  # weights are gathered around it as around a forward
        self._modules = [module for module in lm.modules() if isinstance(module, FSDPModule)]
        with torch.no_grad():
            # torch's `FSDPState._lazy_init` makes the first module that runs the root of the modules inside it: the
            # outermost must run first.
            lm(*self._probe())
        self._set(False)
        if not spec.gather:
            self._take_turns()

    def bring(self, is_gathered: bool) -> None:
        """Gather the weights for forwards without gradients, or release all but this process's shards.

        All processes must call it.
        """
        if self.is_gathered != is_gathered:
            gather("gathering the weights" if is_gathered else "releasing the weights", None)
            self._set(is_gathered)

    def whole(self) -> Scorer | None:
        """Return an unsharded copy without critic, on the host, in the process of rank 0; return None in the others.

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

    def twin(self) -> Scorer:
        """Return a frozen copy without critic, sharded in the same way; all processes must call it."""
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
            # Releases all weights, and clears the recorded order of forwards, by which torch's `FSDPParamGroup` gathers
            # ahead in the backward pass: a rollout's order differs between processes, so that they would gather
            # different layers.
            cast("FSDPModule", self.lm).reset_iter_state()
        for module in self._modules:
            stays = is_gathered and (self.spec.gather or module not in self._layers)
            # In the update the root stays gathered from forward to backward, which is `fully_shard`'s own default.
            module.set_reshard_after_forward(not stays and module is not self.lm, recurse=False)
            if stays:
                module.unshard()
        self.is_gathered = is_gathered

    def _probe(self) -> tuple[Any, ...]:
        """Return the inputs of a forward of a few tokens."""
        return tuple(tensor.to(self.device) for tensor in self._backbone.probe_inputs())

    def _take_turns(self) -> None:
        """Make each forward of a trunk wait until all other processes take part in it."""
        trunks: list[tuple[nn.Module, Read]] = [(trunk_of(self._backbone.model), self._backbone.read)]
        if isinstance(self.lm.critic, TrunkCritic):
            trunks.append((self.lm.critic.trunk, self.lm.critic.read))
        for trunk, read in trunks:
            name = offer_help(self, partial(Shards._help, trunk=len(self._reads)))
            trunk.register_forward_pre_hook(lambda *_, name=name: self._wait_for_turn(name))
            self._reads.append(read)

    def _wait_for_turn(self, name: str) -> None:
        # A forward with gradients belongs to an update, in which all processes run the same number of forwards.
        if not self._is_helping and not torch.is_grad_enabled():
            take_turn(name)

    @torch.no_grad()
    def _help(self, trunk: int) -> None:
        """Take part in another process's forward of a trunk, by a forward of a few tokens."""
        self._is_helping = True
        try:
            # In an empty context: this process may be inside a forward of its own, whose context variables (the layout
            # of a decoding step) do not fit this one.
            Context().run(self._reads[trunk], *self._probe())
        finally:
            self._is_helping = False


def gathered(lm: SequenceScorer) -> AbstractContextManager[None]:
    """Return a context in which forwards without gradients can read the weights, sharded or not.

    If the weights are sharded, all processes must enter and leave the context.
    """
    return _with_weights(lm, True)


def released(lm: SequenceScorer) -> AbstractContextManager[None]:
    """Return a context in which sharded parameters are `DTensor`s; all processes must enter and leave it."""
    return _with_weights(lm, False)


@contextmanager
def _with_weights(lm: SequenceScorer, is_gathered: bool) -> Iterator[None]:
    if lm.shards is None:
        yield
        return
    before = lm.shards.is_gathered
    lm.shards.bring(is_gathered)
    try:
        yield
    finally:
        lm.shards.bring(before)


@contextmanager
def sharded_alone(module: nn.Module) -> Iterator[None]:
    """Return a context in which the own parameters of a sharded module are `DTensor`s, whatever those around it are.

    If the module is sharded, all processes must enter and leave the context.
    """
    is_gathered = isinstance(module, FSDPModule) and not isinstance(next(module.parameters()), DTensor)
    if is_gathered:
        cast("FSDPModule", module).reshard()
    try:
        yield
    finally:
        if is_gathered:
            cast("FSDPModule", module).unshard()


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor; return any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, whole in each process, sharded like `like`; return a sharded tensor as it is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    device = like.device_mesh.device_type
    return distribute_tensor(tensor.to(device), like.device_mesh, like.placements, src_data_rank=None)


def _without_weights(lm: Scorer) -> Scorer:
    """Return a frozen copy without critic, whose parameters are on the meta device: shapes without memory."""
    empty = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), False) for weight in lm.parameters()}
    # `deepcopy` uses the memo's entry for an id in place of a copy.
    return copy.deepcopy(lm, {**empty, id(lm.critic): nn.Identity()}).eval()


def _allocate(plain: Scorer) -> Scorer:
    """Return a copy on the host whose parameters have memory, but no values yet."""
    empty = {id(weight): nn.Parameter(torch.empty_like(weight, device="cpu"), False) for weight in plain.parameters()}
    return copy.deepcopy(plain, cast("dict[int, Any]", empty))


def _checked(lm: SequenceScorer, spec: Sharded) -> Backbone:
    """Return the backbone of a model that can be sharded.

    Raises:
        ValueError: If it cannot be sharded, with the reason.
    """
    backbone, reason = lm.backbone, None
    if not isinstance(backbone, Backbone):
        reason = f"a {type(backbone).__name__}, whose layers are not transformers'"
    elif lm.lagged is not None:
        reason = "top_p_lag, whose copy follows the policy's whole weights"
    elif is_placed(backbone.model):
        reason = "weights that `device_map` or `quantization_config` has placed"
    elif not spec.gather and not any(isinstance(module, GradientCheckpointingLayer) for module in lm.modules()):
        reason = f"a {type(backbone.model).__name__} with gather=False, whose layers cannot be told apart"
    elif not hasattr(FSDPModule, "reset_iter_state"):
        reason = f"torch {torch.__version__}, whose `fully_shard` cannot be reset; 2.13 can"
    elif lm.backbone.is_encoder_decoder and not spec.gather:
        reason = (
            "an encoder-decoder in lock-step, whose encoder and decoder are not read equally often; use gather=True"
        )
    if reason is not None:
        raise ValueError(f"Expected a policy that can be sharded, got {reason}.")
    return cast("Backbone", backbone)
