"""The only file that knows transformers' models: load one, read hidden states and logits, check what it can do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from textenv.extras import check_extra
from textenv.model_loading import from_config, from_pretrained, load_whole

from .cache import PrefixCache
from .decoding import attends_by_row, attention_by_row
from .language_model import BackendSpec, LengthError
from .layers import disable_dropout, fuse_activations
from .trainable import Trainable, check_in_memory, is_checkpointing, is_placed, set_trainable

PROBE_LENGTH = 4
PROBE_LOGIT = 100.0  # what the largest logit of the probe is scaled to
PROBE_TOLERANCE = 1e-3
SHORTER = "lower max_prompt_tokens or max_new_tokens"
ELSEWHERE = {"cache_dir", "token", "local_files_only"}  # with these a name is not looked for where it usually is
TRUST = "trust_remote_code"


@runtime_checkable
class LMSpec(Protocol):
    """Something small that pickles and builds a language model; `policy_kwargs` hold it."""

    def build(self) -> PreTrainedModel:
        """Return the model, with float32 weights where they are trained."""


LMLike: TypeAlias = str | PathLike[str] | PreTrainedConfig | LMSpec | BackendSpec


class Pretrained:
    """A checkpoint's weights, which pickle as its config once they are loaded.

    Stable-Baselines3 stores `policy_kwargs` in the file it saves and builds the policy again on `PPO.load`, before it
    copies the saved weights in. With this spec that needs neither a download nor the folder: after the first `build`
    only the config is pickled. A bare name or path is loaded by name again, and so is a quantised model.

    Args:
        name: A name on the hub or the path of a folder, for `AutoModelForCausalLM.from_pretrained`, or
            `AutoModelForSeq2SeqLM` where its config says `is_encoder_decoder`; "demo" is the built-in one.
        **kwargs: Its other arguments. `dtype` is float32 unless given. With a `quantization_config` of transformers
            the frozen base of a LoRA is held in 8 or 4 bits.

    Raises:
        ImportError: When built, if a package is missing: accelerate (extra `sft`) for `device_map` or
            `quantization_config`, and what else the latter needs, as bitsandbytes.
        ValueError: When built, if the folder lacks a tensor of the model, or has others.

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
        """Return the checkpoint's model, or after unpickling a fresh one of its config, to load weights into."""
        if self.name is None:
            assert self.config is not None, "pickled only once built"
            return from_config(self._auto_class(self.config), self.config, self.kwargs.get(TRUST, False))
        for option in [one for one in ("device_map", "quantization_config") if self.kwargs.get(one) is not None]:
            check_extra("sft", "accelerate", f"Pretrained({option}=...)")
        from .demo import model_folder  # later: the demo's model is trained with what builds on this module

        name = self.name if ELSEWHERE & self.kwargs.keys() else model_folder(self.name)
        config = from_pretrained(AutoConfig, name, **self.kwargs)
        model = load_whole(self._auto_class(config), name, fresh_head=self._makes_head, **self.kwargs)
        self.config = model.config
        return model

    @property
    def _makes_head(self) -> bool:
        """Whether a head that the folder lacks is a new one."""
        return False

    @staticmethod
    def _auto_class(config: PreTrainedConfig) -> Any:
        return _auto_model(config)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the config alone once it is known."""
        if self.config is None or "quantization_config" in self.kwargs:  # a config builds no quantised weights
            return self.__dict__.copy()
        return {"name": None, "kwargs": {TRUST: True} if self.kwargs.get(TRUST) else {}, "config": self.config}


class PretrainedRewardModel(Pretrained):
    """A checkpoint of a model that scores a text by one number; pickles as `Pretrained` does.

    Args:
        name: A name on the hub or the path of a folder, for `AutoModelForSequenceClassification.from_pretrained`.
        **kwargs: Its other arguments. `dtype` is float32 unless given. With `num_labels` a head that the folder lacks
            is a fresh one; without, it must be there.
    """

    @property
    def _makes_head(self) -> bool:
        return "num_labels" in self.kwargs  # which says how large the new one is

    @staticmethod
    def _auto_class(config: PreTrainedConfig) -> Any:
        return AutoModelForSequenceClassification

    def build(self) -> PreTrainedModel:
        """Return the model.

        Raises:
            ValueError: If it has another number of scores than one, or trainable weights of 16 bits.
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
        lm: Where it comes from.
        train: What of it is trained; None freezes all.

    Raises:
        TypeError: If `lm` is a live model: `policy_kwargs` are pickled, its weights would be stored twice.
        ValueError: If the model has trainable weights of 16 bits, or offloaded ones.
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


def _refuse_16_bits(model: PreTrainedModel) -> None:
    small = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.element_size() < 4]
    if small:
        raise ValueError(
            f"Expected trainable weights in float32, got {model.get_parameter(small[0]).dtype} in {small[0]!r} and "
            f"{len(small) - 1} more: steps of 1e-5 round to nothing in 16 bits. Load with dtype=torch.float32 and "
            "pass policy_kwargs=dict(autocast='bfloat16') for speed."
        )


def _auto_model(config: PreTrainedConfig) -> Any:
    # The causal class would load, of some encoder-decoders, the half that it finds, with fresh embeddings.
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_fits(model: PreTrainedModel, vocab_size: int, n_positions: int, cure: str = SHORTER) -> None:
    """Raise ValueError where the model has fewer embedding rows or positions than that."""
    rows = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if rows < vocab_size:
        raise ValueError(
            f"Expected a model with at least the {vocab_size} tokens of the tokenizer, got {rows} embedding rows. "
            "Use the model's own tokenizer, or resize_token_embeddings and save the model."
        )
    check_length(model, n_positions, cure)


def n_positions(model: PreTrainedModel) -> int | None:
    """Return how long a sequence the model can read, in tokens; None where nothing bounds it (BLOOM's ALiBi)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model: PreTrainedModel, n_tokens: int, cure: str = SHORTER) -> None:
    """Raise LengthError where sequences of `n_tokens` are longer than the model can read."""
    limit = n_positions(model)
    if limit is not None and n_tokens > limit:
        fact = f"Expected prompt and completion to fit the model's {limit} positions, got up to {n_tokens} tokens"
        raise LengthError(fact, cure, n_tokens - limit)


class Backbone(nn.Module):
    """A causal language model, read as hidden states and logits at chosen places.

    What it relies on is checked once, on a probe of a few tokens: whether logits are the output embeddings of the
    hidden states (not so for Cohere, Granite or Gemma-2, which get their full forward), and whether decoding with
    cached keys and values equals a full forward (not so for recurrent models, which then run without, with a warning).

    Args:
        model: The model.
        vocab_size: How many tokens the tokenizer has; embedding rows beyond it are never sampled and never scored.
        n_positions: The longest sequence that will be asked for, in tokens.

    Raises:
        ValueError: If the model has fewer embedding rows or positions than that.
    """

    is_encoder_decoder = False

    def __init__(self, model: PreTrainedModel, vocab_size: int, n_positions: int) -> None:
        super().__init__()
        check_fits(model, vocab_size, n_positions)
        self.model = model
        disable_dropout(model)
        fuse_activations(model)
        self.vocab_size = vocab_size
        self.head_is_linear = True
        self._probe()

    def check_length(self, n_tokens: int, n_written: int = 0) -> None:
        """Raise ValueError where `n_tokens`, and `n_written` behind them, are more than the model can read."""
        check_length(self.model, n_tokens + n_written)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    @property
    def takes_cache(self) -> bool:
        """Whether a read may be given a cache now: layers that compute their activations again drop it."""
        return not (self.training and is_checkpointing(self.model))

    def new_cache(self) -> PrefixCache | None:
        """Return what decodes one token a row from cached keys and values; None where that would not be exact."""
        return PrefixCache(self) if self.is_cacheable else None

    @contextmanager
    def whole_model(self) -> Iterator[PreTrainedModel]:
        """Give the model as transformers built it, each weight a parameter in its place, to be saved."""
        yield self.model

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        """Move or cast the weights, but those that transformers dispatched or quantised stay where it put them."""
        return self if is_placed(self.model) else super()._apply(fn, recurse)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, H) and logits (N, V); the inputs are those of `read`."""
        hidden, logits = self.read(*inputs)
        return hidden, self.logits(hidden) if logits is None else logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H), where the head is linear."""
        return self.model.get_output_embeddings()(hidden)[:, : self.vocab_size].to(hidden.device)

    def read(
        self,
        ids: Tensor,
        rows: Tensor,
        cols: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the trunk and read it at the places (rows, cols); the head is left to `logits` where it is linear.

        Args:
            ids: Tokens, (B, T); without a mask padded on the right, which a causal model does not see.
            rows: Which rows to read, (N,).
            cols: Which columns of those rows, (N,).
            attention_mask: True at real tokens, cached ones included, (B, cached + T).
            position_ids: The position of each token in its row, (B, T).
            cache: Keys and values of earlier tokens; extended in place.

        Returns:
            Hidden states (N, H), and logits (N, V) where they do not follow from those, else None.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if cache is not None:
            inputs["past_key_values"] = cache
        with attention_by_row(self.model.config.get_text_config()):
            if self.head_is_linear:
                return at(self.model.base_model(**inputs).last_hidden_state, rows, cols), None  # (N, H)
            output = self.model(**inputs, output_hidden_states=True)
        return at(output.hidden_states[-1], rows, cols), at(output.logits[..., : self.vocab_size], rows, cols)

    def prefill(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Cache:
        """Return the keys and values of left-padded rows, (B, T)."""
        # Without a config the cache keeps every column of sliding-window layers too; the mask does the sliding.
        cache = DynamicCache()
        self.model.base_model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    @torch.no_grad()
    def _probe(self) -> None:
        places = self.probe_places()
        was_training = self.model.training
        self.model.eval()
        head = self.model.get_output_embeddings()
        largest = float(head(self.read(*places)[0]).abs().max())
        # A soft cap bends large logits only, and fresh weights, which trained ones may replace, give small ones.
        scale = PROBE_LOGIT / max(largest, 1e-6)
        hook = head.register_forward_hook(lambda module, inputs, output: output * scale)
        expected = self._full_logits(*places)
        hidden, logits = self(*places)
        self.head_is_linear = close(logits, expected)
        if not self.head_is_linear:
            hidden, logits = self(*places)
        self.hidden_size = hidden.shape[-1]
        self.is_cacheable = not self.model._is_stateful and self._decodes_like(expected, *places)
        self.takes_new_rows = self.is_cacheable and self._takes_new_rows(expected, *places)
        hook.remove()
        self.model.train(was_training)
        if not self.is_cacheable:
            warnings.warn(
                f"{type(self.model).__name__} does not decode exactly from cached keys and values (recurrent layers?): "
                "it runs without a cache, in time that grows with the square of the length.",
                stacklevel=2,
            )

    def probe_places(self) -> tuple[Any, ...]:
        """Return the inputs of `read` for the last of a few tokens."""
        ids = torch.arange(PROBE_LENGTH, device=self.device)[None] % self.vocab_size  # (1, T)
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return ids, zero, zero + PROBE_LENGTH - 1

    def _full_logits(self, ids: Tensor, *places: Tensor) -> Tensor:
        """Return the logits (1, V) that the whole model has there."""
        return self.model(input_ids=ids, use_cache=False).logits[0, -1:, : self.vocab_size]

    def _decodes_like(self, expected: Tensor, ids: Tensor, *places: Tensor) -> bool:
        """Whether two left-padded rows, decoded with a cache, end in the logits of the full forward."""
        device = ids.device
        first = PROBE_LENGTH - 1
        padded = torch.cat([torch.zeros_like(ids[:, :2]), ids[:, :first]], dim=1)  # (1, 2 + T - 1)
        positions = torch.tensor([[0, 0, *range(first)]], device=device)
        cache = self.prefill(padded, positions.new_tensor([[0, 0, *[1] * first]]), positions)
        mask = positions.new_tensor([[0, 0, *[1] * PROBE_LENGTH]])
        zero = torch.zeros(1, dtype=torch.long, device=device)
        _, logits = self(ids[:, -1:], zero, zero, mask, positions.new_tensor([[first]]), cache)
        return close(logits, expected)

    def _takes_new_rows(self, expected: Tensor, ids: Tensor, *places: Tensor) -> bool:
        """Whether a row that is new beside one that goes on ends in the logits of the full forward."""
        if self.is_encoder_decoder or not attends_by_row(self.model.config.get_text_config()):
            return False
        self.takes_new_rows = True
        cache = PrefixCache(self)
        lengths = torch.tensor([2, 1], device=ids.device)
        cache.read(ids.expand(2, -1), lengths)
        try:
            logits = cache.read(ids.expand(2, -1), lengths.new_tensor([3, PROBE_LENGTH]))[1]
        except NotImplementedError:
            return False
        return close(logits[1:], expected)


def at(states: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return what is at (rows, cols) of (B, T, ...), (N, ...), where the places are: a device map may end elsewhere."""
    return states[rows.to(states.device), cols.to(states.device)].to(rows.device)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether logits agree up to `PROBE_TOLERANCE` of the largest."""
    scale = max(1.0, float(b.abs().max()))
    return bool(torch.allclose(a.float(), b.float(), atol=PROBE_TOLERANCE * scale))
