"""The adapter of a policy alone, as a folder of peft, which loads on the model that the training began with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from textenv.checks.extras import needs

from ..models.backbone import Backbone
from ..models.merged_adapters import ADAPTER
from ..models.trainable import COMPILED, adapted_layers

FOLDER = "adapter"  # beside the merged model
PREFIX = "base_model.model."  # the place of the model in peft's `PeftModel`, with which the names in its files begin


def check_adapter(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model has an adapter of LoRA."""
    if not adapted_layers(model):
        raise ValueError(
            "Expected a model with LoRA to write its adapter, got one that was trained without: leave out `adapter` "
            "(--adapter), since the export holds all that was trained; or train with model.train lora "
            "(in Python, train=LoRA(...))."
        )


def write_adapter(backbone: Backbone, folder: Path) -> None:
    """Write a model's adapter into a new folder: adapter_model.safetensors and adapter_config.json.

    `peft.PeftModel.from_pretrained(base, folder)` puts it on the model that the training began with, whose name or
    absolute path is in the file, so that `AutoPeftModelForCausalLM.from_pretrained(folder)` finds it. Of a GGUF file
    the path is that of its folder: `AutoPeftModelForCausalLM.from_pretrained(folder, gguf_file="file.gguf")`.

    Args:
        backbone: The language model, with LoRA.
        folder: The folder to make.

    Raises:
        ValueError: If the model has no adapter.
    """
    check_adapter(backbone.model)
    with needs("lora", "peft", "an adapter's folder"):
        from peft import get_peft_model_state_dict

    with backbone.whole_model() as lm:
        # As transformers' `PreTrainedModel.save_pretrained` does for a model into which adapters were injected.
        weights = get_peft_model_state_dict(lm, lm.state_dict(), ADAPTER, save_embedding_layers=False)
        config: Any = copy.copy(lm.peft_config[ADAPTER])
        # `set_trainable` names layers by a state dict, and injects the weights of experts by a second configuration.
        config.target_modules = sorted(_name(name) for name, layer in adapted_layers(lm).items() if _is_linear(layer))
        name = lm.config._name_or_path  # empty for fresh weights
    config.base_model_name_or_path = str(Path(name).resolve()) if name and Path(name).is_dir() else name or None
    config.task_type = "SEQ_2_SEQ_LM" if backbone.model.config.is_encoder_decoder else "CAUSAL_LM"
    config.inference_mode = True
    folder.mkdir()
    tensors = {PREFIX + _name(name): weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def _is_linear(layer: object) -> bool:
    return not hasattr(layer, "parameter_name")  # peft's `ParamWrapper` has it, around experts and routers


def _name(name: str) -> str:
    """Return a name without the part that `torch.compile` adds."""
    return ".".join(part for part in name.split(".") if part != COMPILED)
