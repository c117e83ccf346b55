"""The construction of language models from a name, a config or a spec, and the checks of their weights."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from textenv.checks.extras import check_extra
from textenv.huggingface.weights import check_whole, from_config, from_pretrained, load_whole

from ..small_models.demo_model import model_folder
from .backbone import Backbone
from .interface import BackendSpec, LanguageModel
from .seq2seq import Seq2SeqBackbone
from .trainable import Trainable, check_in_memory, checkpoint_layers, set_trainable

# With one of these arguments transformers looks for a name elsewhere than usual, so `model_folder` does not check it.
LOOK_UP_OPTIONS = {"cache_dir", "token", "local_files_only"}
TRUST = "trust_remote_code"


@runtime_checkable
class LMSpec(Protocol):
    """A small object that pickles and builds a language model of transformers; `policy_kwargs` hold it as `lm`."""

    def build(self) -> PreTrainedModel:
        """Return the model; the weights that are trained must be float32."""


LMLike: TypeAlias = str | PathLike[str] | PreTrainedConfig | LMSpec | BackendSpec


class Pretrained:
    """A checkpoint's weights, as a spec that pickles only the config once it has been built.

    Stable-Baselines3 pickles `policy_kwargs` into the file that `model.save` writes, and `PPO.load` builds the policy
    again before it copies the saved weights in. With this spec, loading needs neither a download nor the folder. A bare
    name or path is looked up again on load, and so is a quantised model.

    Args:
        name: A name on the hub or the path of a folder, for `AutoModelForCausalLM.from_pretrained`, or
            `AutoModelForSeq2SeqLM` where its config says `is_encoder_decoder`. "demo" is the built-in model.
        **kwargs: Other arguments of `from_pretrained`. `dtype` is float32 unless given. With a `quantization_config`
            of transformers the frozen weights beside LoRA take 8 or 4 bits.

    Raises:
        ImportError: When built, if a package is missing: accelerate (extra `sft`) for `device_map` or
            `quantization_config`, and the quantiser's own package, such as bitsandbytes.
        ValueError: When built, if the folder lacks a tensor of the model, has tensors that the model lacks, or holds an
            adapter of peft.

    Example:
        >>> import pickle
        >>> from agents import Pretrained
        >>> spec = Pretrained("./my-gpt2")
        >>> pickle.loads(pickle.dumps(spec)).name  # not built yet: still a name
        './my-gpt2'
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.name: str | None = str(name)
        self.kwargs = {"dtype": torch.float32, **kwargs}
        self.config: PreTrainedConfig | None = None

    def build(self) -> PreTrainedModel:
        """Return the checkpoint's model; after unpickling, a model with fresh weights, which the saved ones replace."""
        if self.name is None:
            assert self.config is not None, "pickled only once built"
            return from_config(self._auto_class(self.config), self.config, self.kwargs.get(TRUST, False))
        for option in ("device_map", "quantization_config"):
            if self.kwargs.get(option) is not None:
                check_extra("sft", "accelerate", f"Pretrained({option}=...)")
        name = self.name if LOOK_UP_OPTIONS & self.kwargs.keys() else model_folder(self.name)
        check_whole(name)
        config = from_pretrained(AutoConfig, name, **self.kwargs)
        model = load_whole(self._auto_class(config), name, fresh_head=self._makes_head, **self.kwargs)
        self.config = model.config
        return model

    @property
    def _makes_head(self) -> bool:
        """Whether a head that the folder lacks is made with fresh weights."""
        return False

    @staticmethod
    def _auto_class(config: PreTrainedConfig) -> Any:
        return _auto_model(config)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle: once built, the config alone."""
        if self.config is None or "quantization_config" in self.kwargs:  # a config builds no quantised weights
            return self.__dict__.copy()
        return {"name": None, "kwargs": {TRUST: True} if self.kwargs.get(TRUST) else {}, "config": self.config}


class PretrainedRewardModel(Pretrained):
    """A checkpoint of a model that scores a text by one number; it is pickled like `Pretrained`.

    Args:
        name: A name on the hub or the path of a folder, for `AutoModelForSequenceClassification.from_pretrained`.
        **kwargs: Other arguments of `from_pretrained`. `dtype` is float32 unless given. With `num_labels`, a head that
            the folder lacks is made with fresh weights; without it, the folder must have a head.

    Example:
        >>> from agents.models.pretrained import PretrainedRewardModel
        >>> spec = PretrainedRewardModel("./my-gpt2", num_labels=1)  # a language model, which gets a fresh score head
    """

    @property
    def _makes_head(self) -> bool:
        return "num_labels" in self.kwargs  # the number of scores of a new head

    @staticmethod
    def _auto_class(config: PreTrainedConfig) -> Any:
        return AutoModelForSequenceClassification

    def build(self) -> PreTrainedModel:
        """Return the model.

        Raises:
            ValueError: If it does not have exactly one score, or has trainable weights of 16 bits.
        """
        model = super().build()
        if model.config.num_labels != 1:
            raise ValueError(
                f"Expected a reward model with one score (num_labels=1), got {model.config.num_labels} labels in "
                f"{type(model).__name__}."
            )
        _refuse_16_bits(model)
        return model


def build_model(lm: LMLike, train: Trainable | None = "all") -> PreTrainedModel:
    """Build a language model from a name or path, a config (fresh weights) or a spec.

    Args:
        lm: Where the model comes from.
        train: Which of its weights are trained; None freezes all.

    Raises:
        TypeError: If `lm` is a live model: `policy_kwargs` are pickled, so its weights would be stored twice.
        ValueError: If weights that are trained have 16 bits, or are offloaded.

    Example:
        >>> from transformers import GPT2Config
        >>> from agents.models.pretrained import build_model
        >>> model = build_model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40), train=None)
        >>> any(weight.requires_grad for weight in model.parameters())
        False
    """
    if isinstance(lm, nn.Module):
        raise TypeError(
            f"Expected `lm` to be a name, a path, a config or a spec, got a live {type(lm).__name__}, whose weights "
            "would be pickled into every saved file. Save it with save_pretrained(folder) and pass Pretrained(folder)."
        )
    if isinstance(lm, PreTrainedConfig):
        model = from_config(_auto_model(lm), lm)
    elif isinstance(lm, (str, PathLike)):
        model = Pretrained(str(lm)).build()
    elif isinstance(lm, LMSpec):
        model = lm.build()
    else:
        raise TypeError(f"Expected `lm` to be a name, a path, a config or a spec with `build()`, got {lm!r:.80}.")
    set_trainable(model, train)
    check_in_memory(model)
    _refuse_16_bits(model)
    return model


def backbone_class(model: PreTrainedModel) -> type[Backbone]:
    """Return the class that reads a model of transformers: one for causal models, one for encoder-decoders."""
    return Seq2SeqBackbone if model.config.is_encoder_decoder else Backbone


def build_backbone(
    lm: LMLike,
    train: Trainable | None,
    vocab_size: int,
    n_positions: int,
    gradient_checkpointing: bool = False,
    class_of: Callable[[PreTrainedModel], type[Backbone]] = backbone_class,
) -> LanguageModel:
    """Build the `LanguageModel` of a policy or a reference.

    Args:
        lm: Where the model comes from, as for `build_model`, or a `BackendSpec`.
        train: Which weights are trained, as for `build_model`; a `BackendSpec` decides that itself.
        vocab_size: How many tokens the tokenizer has.
        n_positions: The longest sequence that will be read, in tokens.
        gradient_checkpointing: Whether the backward pass computes the activations of each layer again.
        class_of: Returns the class that reads a model of transformers.

    Raises:
        TypeError: As `build_model`.
        ValueError: As `build_model`; also if the model has fewer tokens or positions.
    """
    if isinstance(lm, BackendSpec):
        return lm.build_backend(vocab_size, n_positions)
    model = build_model(lm, train)
    if gradient_checkpointing:
        checkpoint_layers(model)
    return class_of(model)(model, vocab_size, n_positions)


def _refuse_16_bits(model: PreTrainedModel) -> None:
    """Raise ValueError if a number of a trained weight has fewer than 4 bytes."""
    small = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.element_size() < 4]
    if small:
        raise ValueError(
            f"Expected trainable weights in float32, got {model.get_parameter(small[0]).dtype} in {small[0]!r} and "
            f"{len(small) - 1} more: steps of 1e-5 round to nothing in 16 bits. Load with dtype=torch.float32 and "
            "pass policy_kwargs=dict(autocast='bfloat16') for speed."
        )


def _auto_model(config: PreTrainedConfig) -> Any:
    # `AutoModelForCausalLM` also maps some encoder-decoders (BART): it would load their decoder alone.
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
