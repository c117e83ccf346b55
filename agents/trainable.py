"""What is trained of a language model: all of it, its head, its last layers, or adapters beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from textenv.extras import needs

ADAPTER = "default"


@dataclass(frozen=True)
class LastLayers:
    """Train the last `n` transformer layers; embeddings, the layers below, the final norm and the head stay frozen.

    Args:
        n: How many layers.

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

    B starts at zero, so that the policy starts as the model is. Adapters have no dropout and are float32, whatever
    the frozen weights are. Needs peft: `pip install "textenv[lora]"`.

    Args:
        r: The rank of A and B.
        alpha: The scale, in units of 1 / r.
        target_modules: Ends of the names of the linear layers that get an adapter; by default all of them but the
            head (Dettmers et al., 2023, section 4).

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
    """Freeze what is not trained, and add the adapters of LoRA.

    Args:
        model: The language model; changed in place.
        train: What to train. "head" is the output embeddings: where they are tied, the input embeddings too, which
            are the same tensor. None freezes everything.

    Raises:
        ValueError: If `train` is something else, or the model has fewer layers.
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
    """Whether transformers has dispatched or quantised the weights, which then stay where it put them."""
    return not vars(model).keys().isdisjoint(("hf_quantizer", "hf_device_map"))


def check_in_memory(model: PreTrainedModel) -> None:
    """Raise ValueError where a device map has offloaded what is trained: no optimizer would reach it."""
    away = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.is_meta]
    if away:
        raise ValueError(
            f"Expected trainable weights in memory, got {len(away)} that `device_map` has offloaded, {away[0]!r} "
            "first: give the layers that are trained, or that get adapters, a device, and offload the frozen ones."
        )


def transformer_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers of a model, the lowest first."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Compute each layer's activations again in the backward pass, in training mode, instead of keeping them.

    Raises:
        ValueError: From transformers, if the model cannot.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in 5.23; the new name is not in 5.10
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # Wanted by re-entrant checkpoints only; it would carry the backward pass through all frozen layers.
    model.disable_input_require_grads()


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether layers drop cached keys and values in training mode, as they do to compute activations again."""
    return any(layer.gradient_checkpointing for layer in transformer_layers(model))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules with an adapter, by name; none where the model has no LoRA."""
    return {name: module for name, module in model.named_modules() if "lora_A" in dict(module.named_children())}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters: as it was before any training."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of a model as one without adapters has them: W + alpha / r * B A, in new tensors.

    Raises:
        ValueError: If the frozen weights are quantised, which nothing can be added to.
    """
    weights = model.state_dict()
    for name, layer in adapted_layers(model).items():
        base = layer.get_base_layer().weight
        if not base.is_floating_point():
            raise ValueError(f"Expected a floating-point weight to merge the adapter into, got {base.dtype} in {name}.")
        merged = base.detach().float() + layer.get_delta_weight(ADAPTER).detach()
        weights[f"{name}.base_layer.weight"] = merged.to(base.dtype)
    return {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}


def _add_adapters(model: PreTrainedModel, train: LoRA) -> None:
    with needs("lora", "peft", str(train)):
        from peft import LoraConfig, inject_adapter_in_model
    targets = "all-linear" if train.target_modules is None else list(train.target_modules)
    config = LoraConfig(r=train.r, lora_alpha=train.alpha, target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    embedding = model.get_input_embeddings().weight
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # which peft then does: GPT-2's are transposed
        inject_adapter_in_model(config, model, ADAPTER)
    for name, layer in adapted_layers(model).items():
        if layer.get_base_layer().weight is embedding:
            raise ValueError(
                f"Expected target_modules away from the input embeddings, got {name!r}, whose weight is theirs: an "
                "adapter of one would change the other when merged."
            )
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)  # peft follows the frozen weights' type
