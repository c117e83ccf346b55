"""Changes to a model's layers before training: no dropout or other noise, and GPT-2's activation in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer


def transformer_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the transformer layers of a model, the lowest first."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a causal model without its head: its output is the last layer's, normed."""
    base: Any = model.base_model
    if base is model:  # the class has another name for its trunk than `base_model_prefix`: Llama 4, Mllama
        base = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    # The causal BART and its kin wrap their decoder once more, in a module without embeddings (`BartDecoderWrapper`).
    is_wrapper = list(dict(base.named_children())) == ["decoder"]
    return cast("PreTrainedModel", base.get_decoder() if is_wrapper else base)


def keep_first_layers(model: PreTrainedModel, n: int) -> None:
    """Remove the upper transformer layers of a model; its config then has the lower ones alone.

    Args:
        model: The model, changed in place. Its final norm and its head, which stay, then read the n-th layer.
        n: The number of layers that stay, at least 1.

    Raises:
        ValueError: If the model has fewer layers, or its config with `n` layers describes another model.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> from agents.models.layers import keep_first_layers
        >>> model = GPT2Model(GPT2Config(n_layer=3, n_embd=8, n_head=1, vocab_size=40))
        >>> keep_first_layers(model, 2)
        >>> len(model.h), model.config.n_layer
        (2, 2)
    """
    layers = transformer_layers(model)
    if not 1 <= n <= len(layers):
        raise ValueError(f"Expected first_layers from 1 to the model's {len(layers)} layers, got {n}.")
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and list(module) == layers]
    for stack in stacks:
        del stack[n:]
    config = model.config.get_text_config()
    config.num_hidden_layers = n  # under this name in every config (`PreTrainedConfig.attribute_map`)
    if vars(config).get("layer_types"):  # a list of kinds; a property where all layers are of one kind
        config.layer_types = config.layer_types[:n]
    with torch.device("meta"):
        again = type(model)(model.config)
    ours, theirs = ({name: weight.shape for name, weight in own.named_parameters()} for own in (model, again))
    if ours != theirs:
        raise ValueError(
            f"Expected a model whose config builds it with {n} of its layers, too, got {type(model).__name__}: leave "
            "first_layers out."
        )


def set_mode(model: nn.Module, training: bool) -> None:
    """Put a model into training or evaluation mode, so that both modes compute the same numbers.

    With dropout, layer drop, router jitter or an expert capacity for training only, the update would give an unchanged
    policy other probabilities than the rollout sampled from. Modules ask their own `training` flag for all of these, so
    it stays False. Gradients do not depend on it. Only layers that recompute their activations in the backward pass
    need the flag, and get it; see `evaluate_in_checkpoints`.

    Args:
        model: The model, changed in place.
        training: Whether an update follows, in which activation checkpointing saves memory.
    """
    model.eval()
    for layer in transformer_layers(model):
        layer.training = training and layer.gradient_checkpointing


def evaluate_in_checkpoints(model: nn.Module) -> None:
    """Make layers under activation checkpointing compute in evaluation mode, in forward and recomputation alike.

    transformers' `modeling_layers.GradientCheckpointingLayer` checkpoints a layer only while the layer's own `training`
    is True, and with that flag the code of some layers drops activations (`modeling_bart.BartDecoderLayer.forward`).

    Args:
        model: The model, changed in place; layers without activation checkpointing stay as they are.
    """
    for layer in transformer_layers(model):
        if layer.gradient_checkpointing:
            function: Any = layer._gradient_checkpointing_func  # set by `_set_gradient_checkpointing` of transformers
            vars(layer)["_gradient_checkpointing_func"] = partial(_checkpoint, layer, function)


def _checkpoint(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """Return `checkpoint(forward, *args)`, with the layer in evaluation mode whenever `forward` runs."""

    def in_evaluation(*args: Any) -> Any:
        was_training, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = was_training

    return checkpoint(in_evaluation, *args)


@contextmanager
def keys_in_checkpoints(model: nn.Module) -> Iterator[bool]:
    """Let layers under activation checkpointing read and write keys and values; yield whether there are such layers.

    Otherwise transformers' `modeling_layers.GradientCheckpointingLayer` takes `past_key_values` from them: they run
    again in the backward pass, where its own caches would append the same tokens once more. Versions that lack
    `_can_checkpoint_with_cache` always take it.

    Args:
        model: The model. Whatever cache it gets inside must give a layer that runs again the states of the first time.
    """
    layers = [layer for layer in transformer_layers(model) if layer.gradient_checkpointing and layer.training]
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache  # the class has its own


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and layer-drop probability to 0, for a model whose training loop calls `model.train()`.

    It finds these probabilities by name. Other noise stays, such as router jitter; `set_mode` switches off all of it.

    Args:
        model: The model, changed in place.
    """
    # Modules that call `functional.dropout` themselves keep the probability as a float whose name has "drop" in it:
    # `BartAttention.dropout`, `BartDecoder.layerdrop`, `LlamaAttention.attention_dropout`, ...
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def fuse_activations(model: nn.Module) -> None:
    """Replace GPT-2's activation, eight operations in transformers, by the one operation of PyTorch for its formula.

    Both are the tanh approximation of GELU (Hendrycks & Gimpel, 2016, section 2) and agree up to rounding. Neither has
    weights. A small model's forward and backward take about a quarter less time.

    Args:
        model: The model, in which each `NewGELUActivation` of transformers `activations` is replaced.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
