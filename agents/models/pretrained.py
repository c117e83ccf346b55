"""The construction of language models from a name, a config, a spec or a live model, and checks of their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from safetensors import safe_open
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
from textenv.huggingface.gguf import FILE, is_gguf
from textenv.huggingface.weights import check_whole, from_config, from_pretrained, load_whole

from ..small_models.demo_model import model_folder
from .backbone import Backbone
from .interface import BackendSpec, LanguageModel
from .seq2seq import Seq2SeqBackbone
from .trainable import Trainable, check_in_memory, checkpoint_layers, refuse_adapters, set_trainable

# With one of these arguments transformers looks for a name elsewhere than usual, so `model_folder` does not check it.
LOOK_UP_OPTIONS = {"cache_dir", "token", "local_files_only"}
TRUST = "trust_remote_code"


@runtime_checkable
class LMSpec(Protocol):
    """A small object that pickles and builds a language model of transformers; `policy_kwargs` hold it as `lm`."""

    def build(self) -> PreTrainedModel:
        """Return the model; the weights that are trained must be float32."""


LMLike: TypeAlias = str | PathLike[str] | PreTrainedConfig | PreTrainedModel | LMSpec | BackendSpec


class Pretrained:
    """A checkpoint's weights, as a spec that pickles only the config once it has been built.

    Stable-Baselines3 pickles `policy_kwargs` into the file that `model.save` writes, and `PPO.load` builds the policy
    again before it copies the saved weights in. With this spec, loading needs neither a download nor the folder. A bare
    name or path is looked up again on load, and so is a quantised model.

    Args:
        name: A name on the hub or the path of a folder, for `AutoModelForCausalLM.from_pretrained`, or
            `AutoModelForSeq2SeqLM` where its config says `is_encoder_decoder`. "demo" is the built-in model. The path
            of a GGUF file, "folder/file.gguf", loads its weights as floats, which train, save and export as others.
        **kwargs: Other arguments of `from_pretrained`. `dtype` is float32 unless given. With a `quantization_config`
            of transformers the frozen weights beside LoRA take 8 or 4 bits. `gguf_file` names a GGUF file of the folder
            or of the repository on the hub.

    Raises:
        ImportError: When built, if a package is missing: accelerate (extra `sft`) for `device_map` or
            `quantization_config`, the quantiser's own package, such as bitsandbytes, or both packages of the extra
            `gguf` for a GGUF file.
        ValueError: When built, if the folder lacks a tensor of the model, has tensors that the model lacks, or holds an
            adapter of peft; or if transformers does not read the GGUF file.

    Example:
        >>> import pickle
        >>> from agents import Pretrained
        >>> spec = Pretrained("./my-gpt2")
        >>> pickle.loads(pickle.dumps(spec)).name  # not built yet: still a name
        './my-gpt2'
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        if is_gguf(str(kwargs.get(FILE))) and Path(name).is_dir() and "subfolder" not in kwargs:
            name = str(Path(name) / kwargs.pop(FILE))  # the same file by one name, wherever names are read
        self.name: str | None = str(name)
        self.kwargs = {"dtype": torch.float32, **kwargs}
        self.config: PreTrainedConfig | None = None

    def build(self, as_stored: bool = False) -> PreTrainedModel:
        """Return the checkpoint's model; after unpickling, a model with fresh weights, which the saved ones replace.

        Args:
            as_stored: Whether weights that are to be float32 may have the type of their file, if the folder has one for
                all. transformers maps such a file into memory, and reads a page of it when it is used, where another
                type needs a copy of all weights. The caller converts them.
        """
        if self.name is None:
            assert self.config is not None, "pickled only once built"
            return from_config(self._auto_class(self.config), self.config, self.kwargs.get(TRUST, False))
        for option in ("device_map", "quantization_config"):
            if self.kwargs.get(option) is not None:
                check_extra("sft", "accelerate", f"Pretrained({option}=...)")
        name = self.name if LOOK_UP_OPTIONS & self.kwargs.keys() else model_folder(self.name)
        check_whole(name)
        config = from_pretrained(AutoConfig, name, **self.kwargs)
        dtype = self.kwargs["dtype"]
        if as_stored and self.becomes_float32:
            dtype = stored_type(name) or dtype
        kwargs = {**self.kwargs, "dtype": dtype}
        model = load_whole(self._auto_class(config), name, fresh_head=self._makes_head, **kwargs)
        if dtype != self.kwargs["dtype"]:
            model.config.dtype = self.kwargs["dtype"]
        self.config = model.config
        return model

    @property
    def becomes_float32(self) -> bool:
        """Whether the weights are float32 in the end, whatever type their file has."""
        return self.kwargs.get("dtype") == torch.float32

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

    def build(self, as_stored: bool = False) -> PreTrainedModel:
        """Return the model.

        Raises:
            ValueError: If it does not have exactly one score, or has trainable weights of 16 bits.
        """
        model = super().build(as_stored)
        if model.config.num_labels != 1:
            raise ValueError(
                f"Expected a reward model with one score (num_labels=1), got {model.config.num_labels} labels in "
                f"{type(model).__name__}."
            )
        refuse_16_bits(model)
        return model


class LiveModel:
    """A model of transformers in this process, as a spec: it builds the model itself, and pickles as its config alone.

    Unpickled it is a built `Pretrained`, so that weights are stored once in the file that `model.save` writes.

    Args:
        model: The model: in any mode, and with dropout or without, which a policy switches off.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = copy.deepcopy(model.config)
        self.config.dtype = model.dtype  # `float()` and `half()` of torch do not change the config
        # Code of its own has already run, in a module that transformers' `get_class_from_dynamic_module` made.
        self.kwargs = {TRUST: True} if type(model).__module__.startswith("transformers_modules.") else {}

    def build(self) -> PreTrainedModel:
        """Return the model.

        Raises:
            ValueError: If it has adapters or quantised weights, or its config would not build it again: with another
                class or other layers, or weights of several types.
        """
        model = self.model
        refuse_adapters(model)
        if "hf_quantizer" in vars(model):  # set by `from_pretrained` of transformers
            raise ValueError(
                f"Expected a live model with weights in floats, got a quantised {type(model).__name__}, which its "
                "config alone does not build again: pass Pretrained(name, quantization_config=...), or the path of its "
                "GGUF file."
            )
        with torch.device("meta"):
            again = from_config(_auto_model(self.config), self.config, self.kwargs.get(TRUST, False))
        ours, theirs = (
            {name: (*tensor.shape, tensor.dtype) for name, tensor in built.state_dict().items()}
            for built in (model, again)
        )
        unlike = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if type(model) is not type(again) or unlike:
            what = f": {unlike[0]!r} and {len(unlike) - 1} more weights differ" if unlike else ""
            raise ValueError(
                f"Expected a live model as its config builds it, of one type of float, got {type(model).__name__} in "
                f"the place of {type(again).__name__}{what}. A file that `save` writes could not be loaded: change the "
                "config with the model (or model.float()), or pass a spec of your own with a `build()`."
            )
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make the `Pretrained` that it is unpickled as."""
        return Pretrained.__new__, (Pretrained,), {"name": None, "kwargs": self.kwargs, "config": self.config}

    def __repr__(self) -> str:
        return f"LiveModel({type(self.model).__name__})"


def as_spec(lm: LMLike) -> LMLike:
    """Return a live model as a spec that pickles small, and anything else as it is."""
    return LiveModel(lm) if isinstance(lm, PreTrainedModel) else lm


def build_model(lm: LMLike, train: Trainable | None = "all", as_stored: bool = False) -> PreTrainedModel:
    """Build a language model from a name or path, a config (fresh weights) or a spec; take a live model as it is.

    Args:
        lm: Where the model comes from.
        train: Which of its weights are trained; None freezes all. "all" leaves those frozen that a live model freezes.
        as_stored: See `Pretrained.build`.

    Raises:
        TypeError: If `lm` is none of these, or a module around a model of transformers.
        ValueError: If weights that are trained have 16 bits, or are offloaded; or if a live model is frozen as a whole
            though it is to be trained, or its config would not build it again (see `LiveModel`).

    Example:
        >>> from transformers import GPT2Config
        >>> from agents.models.pretrained import build_model
        >>> model = build_model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40), train=None)
        >>> any(weight.requires_grad for weight in model.parameters())
        False
    """
    lm = as_spec(lm)
    if isinstance(lm, nn.Module):
        refuse_adapters(lm)
        raise TypeError(
            f"Expected `lm` to be a model of transformers, a name, a path, a config or a spec, got another module, "
            f"{type(lm).__name__}: pass the model of transformers that it is made of."
        )
    if isinstance(lm, (str, PathLike)):
        lm = Pretrained(str(lm))
    if isinstance(lm, PreTrainedConfig):
        model = from_config(_auto_model(lm), lm)
    elif isinstance(lm, Pretrained):
        model = lm.build(as_stored)
    elif isinstance(lm, LMSpec):
        model = lm.build()
    else:
        raise TypeError(
            f"Expected `lm` to be a name, a path, a config or a spec with `build()`, or a model, got {lm!r:.80}."
        )
    set_trainable(model, train)
    if isinstance(lm, LiveModel) and train == "all" and not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"Expected a {type(model).__name__} with a weight to train, got one whose weights are all frozen (as a "
            "reference freezes its model): model.requires_grad_(True) first, or another model."
        )
    check_in_memory(model)
    if not (as_stored and isinstance(lm, Pretrained) and lm.becomes_float32):
        refuse_16_bits(model)
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
    as_stored: bool = False,
) -> LanguageModel:
    """Build the `LanguageModel` of a policy or a reference.

    Args:
        lm: Where the model comes from, as for `build_model`, or a `BackendSpec`.
        train: Which weights are trained, as for `build_model`; a `BackendSpec` decides that itself.
        vocab_size: How many tokens the tokenizer has.
        n_positions: The longest sequence that will be read, in tokens.
        gradient_checkpointing: Whether the backward pass computes the activations of each layer again.
        class_of: Returns the class that reads a model of transformers.
        as_stored: See `Pretrained.build`.

    Raises:
        TypeError: As `build_model`.
        ValueError: As `build_model`; also if the model has fewer tokens or positions.
    """
    if isinstance(lm, BackendSpec):
        return lm.build_backend(vocab_size, n_positions)
    model = build_model(lm, train, as_stored)
    if gradient_checkpointing:
        checkpoint_layers(model)
    return class_of(model)(model, vocab_size, n_positions)


def refuse_shared(model: nn.Module, weights: Iterable[nn.Parameter], role: str) -> None:
    """Raise ValueError if a model has one of the policy's weights, and so would change or freeze with it.

    Args:
        model: A live model, or a part of one.
        weights: The weights of the policy.
        role: The part that the model plays beside the policy, in words.
    """
    if not {id(weight) for weight in weights}.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"Expected a model of its own as {role}, got a live {type(model).__name__} with weights of the policy: "
            "load it a second time, or leave it out (the reference is then the policy's start, the critic a head on "
            "the policy)."
        )


def stored_type(folder: str | PathLike[str]) -> torch.dtype | None:
    """Return the type of all weights in a folder's safetensors files; None if there are none or several types."""
    types = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            types |= {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118  (no mapping); maps, reads nothing
    return types.pop() if len(types) == 1 else None


def refuse_16_bits(model: PreTrainedModel) -> None:
    """Raise ValueError if a number of a trained weight has fewer than 4 bytes."""
    small = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.element_size() < 4]
    if small:
        raise ValueError(
            f"Expected trainable weights in float32, got {model.get_parameter(small[0]).dtype} in {small[0]!r} and "
            f"{len(small) - 1} more: steps of 1e-5 round to nothing in 16 bits. Load with dtype=torch.float32, "
            "or call model.float(), and pass policy_kwargs=dict(autocast='bfloat16') for speed."
        )


def _auto_model(config: PreTrainedConfig) -> Any:
    # `AutoModelForCausalLM` also maps some encoder-decoders (BART): it would load their decoder alone.
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
