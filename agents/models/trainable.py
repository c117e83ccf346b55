"""The trainable weights of a language model: all of them, the head, the last layers, or LoRA adapters."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from textenv.checks.extras import needs

from .layers import transformer_layers
from .merged_adapters import ADAPTER, let_merge, merged_weight

COMPILED = "_orig_mod"  # the name of the original module inside the one that `torch.compile` returns


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

    By default all linear layers but the head get an adapter (Dettmers et al., 2023, section 4). In a mixture of experts
    (Mixtral, Qwen3-MoE, DeepSeek-V3, ...) each expert and the router have an A and a B of their own. The experts of
    DBRX, whose weights another module reads, stay frozen. A forward adds the adapters to a copy of the experts'
    weights, in the type of these weights: 16 bits round small changes away.

    A rollout in float32 decodes from copies of the adapted weights of linear layers, with the adapters merged in; see
    `merged_adapters`. The copies take at most an eighth of the device's memory, and are freed before the update.

    Args:
        r: The rank of A and B.
        alpha: The numerator of the scale alpha / r.
        target_modules: The endings of the names of the layers that get an adapter, such as `["q_proj", "v_proj"]`, or
            of weights outside such layers, such as `["experts.down_proj"]`; by default all, as above.
        use_dora: Whether each adapted weight is also divided by the norms of its rows, and multiplied by trained
            magnitudes, which start as the norms of W (DoRA; Liu et al., 2024, equation 5). Not for experts.
        use_rslora: Whether the scale is alpha / sqrt(r) (rsLoRA; Kalajdzievski, 2023).
        modules_to_save: Refused: peft would train a copy of these modules.

    Raises:
        ImportError: When built without peft.
        ValueError: If `modules_to_save` is given. When built: if a target is the input embedding, or another module has
            its weight, too; if an ending names nothing; with `use_dora`, if a target is not a linear layer.

    Example:
        >>> from agents import LoRA
        >>> policy_kwargs = dict(train=LoRA(r=16, alpha=32))
    """

    r: int = 8
    alpha: float = 16
    target_modules: Sequence[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    modules_to_save: InitVar[Sequence[str] | None] = None

    def __post_init__(self, modules_to_save: Sequence[str] | None) -> None:
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"Expected target_modules to be a list of endings of names, got {self.target_modules!r}: put it into a "
                "list, or leave it out for all linear layers."
            )
        if modules_to_save is not None:
            raise ValueError(
                f"Expected LoRA without modules_to_save, got {modules_to_save!r:.80}: train='head' or LastLayers(n) "
                "trains whole modules, and target_modules=[...] gives linear layers an adapter, an untied head, too."
            )


Trainable: TypeAlias = Literal["all", "head"] | LastLayers | LoRA


def set_trainable(model: PreTrainedModel, train: Trainable | None) -> None:
    """Freeze the weights that are not trained, and add the adapters of LoRA.

    Args:
        model: The language model; changed in place.
        train: The part to train. "head" is the output embedding; if the input embedding is tied to it, both are one
            tensor and are trained. None freezes everything.

    Raises:
        ValueError: If `train` is anything else, the model has fewer layers than `LastLayers` asks for, or it has
            adapters already.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from agents import LastLayers
        >>> from agents.models.trainable import set_trainable
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=40))
        >>> set_trainable(model, LastLayers(1))
        >>> sorted({name.split(".")[2] for name, weight in model.named_parameters() if weight.requires_grad})
        ['1']
    """
    refuse_adapters(model)
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

    `modeling_layers.GradientCheckpointingLayer` of transformers replaces `past_key_values` by None, except inside
    `layers.keys_in_checkpoints`.
    """
    return any(layer.gradient_checkpointing for layer in transformer_layers(model))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules that have an adapter, by name; none if the model has no LoRA."""
    return {name: module for name, module in model.named_modules() if "lora_A" in dict(module.named_children())}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Have the model compute without its adapters inside: as before any training."""
    layers = adapted_layers(model).values()
    weights = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # which trains adapters again, those that `CriticWarmup` holds fixed as well
        for weight, is_trained in weights:
            weight.requires_grad_(is_trained)


def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict of the same model without LoRA: W + alpha / r * B A, in new tensors, under W's own name.

    With DoRA each row of that sum is scaled to its trained magnitude. Weights inside a module that `torch.compile` has
    returned are under the names that they had before.

    Raises:
        ValueError: If the frozen weights are quantised: adapters cannot be added to 8 bits or fewer.
    """
    weights = {_plain_name(name): weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    for name, layer in adapted_layers(model).items():
        weight_name = _weight_name(layer)
        base = getattr(layer.get_base_layer(), weight_name)
        if not base.is_floating_point() or base.element_size() < 2:  # 8 bits have a scale beside them
            raise ValueError(
                f"Expected a weight of 16 bits or more to merge the adapter into, got {base.dtype} in {name}."
            )
        weights[_plain_name(f"{name}.{weight_name}")] = merged_weight(layer, base).to(base.dtype)
    return weights


def _weight_name(layer: Any) -> str:
    """Return the name that an adapted weight has in its module: peft's `ParamWrapper` can adapt any."""
    return str(getattr(layer, "parameter_name", "weight"))


def _plain_name(name: str) -> str:
    """Return a weight's name without the modules that peft (several for experts) and `torch.compile` put around it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", COMPILED))


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the original of a module that `torch.compile` has returned; any other module as it is."""
    return dict(module.named_children()).get(COMPILED, module)


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError if peft has wrapped the model or put a module into it.

    `adapters_off` would switch these off as well as those of the training, and the KL penalty would then compare the
    policy with another model than its start.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"Expected a model without adapters of peft, got {type(module).__name__}"
                f"{f' at {name!r}' if name else ''}: merge them (get_peft_model(...).merge_and_unload()), and let "
                "train=LoRA(...) add the adapters that are trained."
            )


def _add_adapters(model: PreTrainedModel, train: LoRA) -> None:
    """Inject adapters in place: the model keeps its class, unlike with peft's `get_peft_model`, which wraps it."""
    with needs("lora", "peft", str(train)):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import Linear
    layers, weights = _targets(model, train.target_modules)
    if train.use_dora and weights:
        raise ValueError(
            f"Expected linear layers for LoRA(use_dora=True), got {weights[0]!r}, a weight of {len(weights)} outside "
            "such layers (of experts or a router): leave use_dora out, or name linear layers in target_modules."
        )
    options: dict[str, Any] = {
        "r": train.r,
        "lora_alpha": train.alpha,
        "lora_dropout": 0.0,
        "use_dora": train.use_dora,
        "use_rslora": train.use_rslora,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # peft says that it handles GPT-2's transposed W
        # In some mixtures of experts peft takes the names of linear layers for those that experts had in an older
        # transformers (`convert_peft_config_for_transformers`), and leaves these layers out. Names in a `state_dict` it
        # takes as they are, and warns that it would have chosen others.
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters, an inconsistency")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # the second call warns
        if layers:
            names = {f"{name}.lora_A.weight": torch.empty(0) for name in layers}
            inject_adapter_in_model(LoraConfig(**options, target_modules=[]), model, ADAPTER, state_dict=names)
        if weights:
            config = LoraConfig(**options, target_modules=[], target_parameters=weights)
            inject_adapter_in_model(config, model, ADAPTER)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name)
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)  # peft makes adapters in the frozen weights' type
    if not is_placed(model):
        # Subclasses, the layers of quantisers and those of experts compute otherwise.
        let_merge([layer for layer in adapted_layers(model).values() if type(layer) is Linear])


def _targets(model: PreTrainedModel, endings: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the names of the layers that get an adapter, and those of weights outside layers: experts and routers.

    Raises:
        ValueError: If an ending names nothing, or the input embedding or its weight.
    """
    layers, shared = _linear_layers(model), _shared(model)
    weights = _matrices(model, layers)
    if endings is None:
        unfit = {model.get_output_embeddings(), *_read_by_kernels(model)}
        chosen = [
            name
            for name in layers
            if (layer := model.get_submodule(name)) not in unfit and id(layer.weight) not in shared
        ] + weights
    else:
        others = [name for name, module in model.named_modules() if isinstance(module, (nn.Embedding, _ConvNd))]
        layers += others
        chosen = [name for name in layers + weights if any(f".{name}".endswith(f".{end}") for end in endings)]
        unused = [end for end in endings if not any(f".{name}".endswith(f".{end}") for name in chosen)]
        if unused:
            known = sorted({name.rpartition(".")[2] for name in layers + weights})
            raise ValueError(
                f"Expected target_modules among the endings of the names of {type(model).__name__}'s layers, "
                f"{', '.join(known)}, got {unused[0]!r}."
            )
    for name in chosen:
        if name in layers and id(model.get_submodule(name).weight) in shared:
            raise ValueError(
                f"Expected target_modules with weights of their own, got {name!r}, whose weight another layer has, too "
                "(the input embeddings, for instance): an adapter of one would change the other when merged."
            )
    return [name for name in chosen if name in layers], [name for name in chosen if name in weights]


def _shared(model: PreTrainedModel) -> set[int]:
    """Return the ids of the weights that several modules have: tied embeddings, or Zamba-2's repeated blocks."""
    held = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return {weight for weight, n_modules in held.items() if n_modules > 1} | {id(model.get_input_embeddings().weight)}


def _read_by_kernels(model: PreTrainedModel) -> list[nn.Module]:
    """Return the output layers of Mamba's mixers: fused kernels read their weights without an adapter; peft refuses."""
    mixers = (dict(module.named_children()) for module in model.modules())
    return [mixer["out_proj"] for mixer in mixers if "conv1d" in mixer and "out_proj" in mixer]


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers, the head included."""
    return [name for name, module in model.named_modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module computes what a linear layer does; not every subclass of `nn.Linear` does.

    The routers of PhiMoE and Llama 4 return several tensors, and DeepSeek-V4's grouped layer takes states by group.
    """
    if not isinstance(module, nn.Linear):
        return isinstance(module, Conv1D)
    weight = module.weight
    has_own_forward = type(module).forward is not nn.Linear.forward  # a model's, or a quantiser's, which peft knows
    if not has_own_forward or weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return True
    ones = weight.new_ones(1, module.in_features)
    with torch.no_grad():
        expected = nn.functional.linear(ones, weight, module.bias)
        try:
            output = module(ones)
        except RuntimeError:  # DeepSeek-V4's layer reshapes states into its groups
            return False
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected)


def _matrices(model: PreTrainedModel, layers: Container[str]) -> list[str]:
    """Return the names of the weights of experts, (E, a, b), and routers, (E, a), outside the linear layers of torch.

    E is a number of experts in the config. A stack of another number is something else, such as RecurrentGemma's gates;
    peft's wrapper would hide the state that their module keeps.
    """
    text = model.config.get_text_config()
    n_experts = {n for name, n in text.to_dict().items() if "expert" in name and isinstance(n, int)}
    names = []
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Embedding, _ConvNd)) or prefix in layers:
            continue
        for name, weight in module.named_parameters(recurse=False):
            if not weight.is_floating_point() or weight.element_size() < 2:  # quantised
                continue
            is_router = weight.ndim == 2 and name == "weight"
            is_stack = weight.ndim == 3 and min(weight.shape[1:]) > 1
            is_derived = isinstance(module, nn.Linear)  # a layer with a forward of its own; see `_is_linear`
            if (is_router or is_stack) and (is_derived or weight.shape[0] in n_experts):
                names.append(f"{prefix}.{name}")
    return names
