"""The trainable weights of a language model: all of them, the head, the last layers, or LoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textenv.checks.extras import needs

from .layers import transformer_layers

ADAPTER = "default"  # the usual name of an adapter in peft (`mapping.inject_adapter_in_model`)
COMPILED = "_orig_mod"  # the name under which the module that `torch.compile` returns has the one that it was given


@dataclass(frozen=True)
class LastLayers:
    """Train the last `n` transformer layers; embeddings, the layers below, the final norm and the head stay frozen.

    Args:
        n: The number of layers, at most all of the model's.

    Raises:
        ValueError: If `n` is not positive.

    Example:
        >>> from agents import LastLayers
        >>> policy_kwargs = dict(train=LastLayers(2))
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Expected `n` to be positive, got {self.n}.")


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters beside the frozen weights: W + alpha / r * B A (Hu et al., 2021, section 4.1).

    B starts at zero, so that the policy starts as the model itself. Adapters have no dropout and are float32, whatever
    the type of the frozen weights. Needs peft: `pip install "textenv[lora]"`.

    Args:
        r: The rank of A and B.
        alpha: The numerator of the scale alpha / r.
        target_modules: The endings of the names of the linear layers that get an adapter, such as
            `["q_proj", "v_proj"]`; by default all linear layers but the head (Dettmers et al., 2023, section 4).

    Raises:
        ImportError: When built without peft.
        ValueError: When built, if a target is the input embedding, or shares its weight.

    Example:
        >>> from agents import LoRA
        >>> policy_kwargs = dict(train=LoRA(r=16, alpha=32))
    """

    r: int = 8
    alpha: float = 16
    target_modules: Sequence[str] | None = None


Trainable: TypeAlias = Literal["all", "head"] | LastLayers | LoRA


def set_trainable(model: PreTrainedModel, train: Trainable | None) -> None:
    """Freeze the weights that are not trained, and add the adapters of LoRA.

    Args:
        model: The language model; changed in place.
        train: The part to train. "head" is the output embedding; if the input embedding is tied to it, both are one
            tensor and are trained. None freezes everything.

    Raises:
        ValueError: If `train` is anything else, or the model has fewer layers than `LastLayers` asks for.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from agents import LastLayers
        >>> from agents.models.trainable import set_trainable
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=40))
        >>> set_trainable(model, LastLayers(1))
        >>> sorted({name.split(".")[2] for name, weight in model.named_parameters() if weight.requires_grad})
        ['1']
    """
    if isinstance(train, str) and train == "all":
        return
    model.requires_grad_(False)
    if isinstance(train, LoRA):
        _add_adapters(model, train)
    elif isinstance(train, LastLayers):
        layers = transformer_layers(model)
        if train.n > len(layers):
            raise ValueError(f"Expected LastLayers of at most the model's {len(layers)} layers, got {train.n}.")
        for layer in layers[-train.n :]:
            layer.requires_grad_(True)
    elif isinstance(train, str) and train == "head":
        model.get_output_embeddings().requires_grad_(True)
    elif train is not None:
        raise ValueError(f"Expected `train` to be 'all', 'head', LastLayers(n) or LoRA(...), got {train!r:.80}.")


def is_placed(model: PreTrainedModel) -> bool:
    """Return whether a device map or a quantiser has placed the weights, which must then stay where they are.

    transformers' `modeling_utils.PreTrainedModel.from_pretrained` sets `hf_quantizer`, accelerate's `dispatch_model`
    `hf_device_map`, as plain attributes.
    """
    return not vars(model).keys().isdisjoint(("hf_quantizer", "hf_device_map"))


def check_in_memory(model: PreTrainedModel) -> None:
    """Raise ValueError if a device map has offloaded a weight that is trained: no optimizer would reach it."""
    # accelerate's `AlignDevicesHook` leaves an offloaded weight on the "meta" device, which holds no data.
    away = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.is_meta]
    if away:
        raise ValueError(
            f"Expected trainable weights in memory, got {len(away)} that `device_map` has offloaded, {away[0]!r} "
            "first: give the layers that are trained, or that get adapters, a device, and offload the frozen ones."
        )


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Switch on activation checkpointing: in training mode, the backward pass recomputes each layer's activations.

    Raises:
        ValueError: From transformers, if the model does not support it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renamed it in 5.23; 5.10 lacks the new name
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # `PreTrainedModel._activation_checkpointing_enable` has also made the output of the input embeddings require a
    # gradient. Only re-entrant checkpoints need that; it would carry the backward pass through all frozen layers.
    model.disable_input_require_grads()


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Return whether activation checkpointing is on: in training mode the layers then ignore cached keys and values.

    `modeling_layers.GradientCheckpointingLayer` of transformers replaces `past_key_values` by None.
    """
    return any(layer.gradient_checkpointing for layer in transformer_layers(model))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules that have an adapter, by name; none if the model has no LoRA."""
    return {name: module for name, module in model.named_modules() if "lora_A" in dict(module.named_children())}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Have the model compute without its adapters inside: as before any training."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict of the same model without LoRA: W + alpha / r * B A, in new tensors, under W's own name.

    Modules that `torch.compile` has put inside another have the names that they had before.

    Raises:
        ValueError: If the frozen weights are quantised: adapters cannot be added to integers.
    """
    weights = model.state_dict()
    for name, layer in adapted_layers(model).items():
        base = layer.get_base_layer().weight
        if not base.is_floating_point():
            raise ValueError(f"Expected a floating-point weight to merge the adapter into, got {base.dtype} in {name}.")
        merged = base.detach().float() + layer.get_delta_weight(ADAPTER).detach()
        weights[f"{name}.base_layer.weight"] = merged.to(base.dtype)
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    return {name.replace(f"{COMPILED}.", ""): weight for name, weight in plain.items()}


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, where `module` is its result; any other module as it is."""
    return dict(module.named_children()).get(COMPILED, module)


def _add_adapters(model: PreTrainedModel, train: LoRA) -> None:
    """Inject adapters in place: the model keeps its class, unlike with peft's `get_peft_model`, which wraps it."""
    with needs("lora", "peft", str(train)):
        from peft import LoraConfig, inject_adapter_in_model
    targets = "all-linear" if train.target_modules is None else list(train.target_modules)
    config = LoraConfig(r=train.r, lora_alpha=train.alpha, target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    embedding = model.get_input_embeddings().weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # peft says that it handles GPT-2's transposed W
        inject_adapter_in_model(config, model, ADAPTER)
    for name, layer in adapted_layers(model).items():
        if layer.get_base_layer().weight is embedding:
            raise ValueError(
                f"Expected target_modules away from the input embeddings, got {name!r}, whose weight is theirs: an "
                "adapter of one would change the other when merged."
            )
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)  # peft makes adapters in the frozen weights' type
