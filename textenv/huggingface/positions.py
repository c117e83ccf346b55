"""The longest text that a model reads, by its positions and by all else that limits it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Half: TypeAlias = Literal["encoder", "decoder"]

# Fields of configs for the number of earlier tokens that a token attends to; of more, attention chooses the highest
# scores. The order of equal scores depends on the width of the batch: rollout and update would choose other tokens.
SELECTIONS = ("index_topk", "keep_window_size")  # DeepSeek-V3.2 and its kin, Doge


class Limit(NamedTuple):
    """The longest text that a model reads, and the part of the model that sets it."""

    n_tokens: int
    kind: str  # behind the number, in an error
    cure: str = ""  # besides shorter texts


def n_positions(model: PreTrainedModel, of: Half = "decoder") -> int | None:
    """Return the longest sequence that a model reads, in tokens; None without a limit; see `length_limit`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5Model
        >>> n_positions(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=24)))
        24
        >>> n_positions(T5Model(T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1))) is None
        True
    """
    limit = length_limit(model, of)
    return None if limit is None else limit.n_tokens


def length_limit(model: PreTrainedModel, of: Half = "decoder") -> Limit | None:
    """Return the smallest limit of a text's length; None without a limit.

    Relative positions set no limit (T5, BLOOM's ALiBi). The limit of an encoder-decoder holds for prompt and completion
    each, except where its config has one of each (LED). RoBERTa and its kin count positions from `padding_idx` + 1 on,
    so that an embedding of 514 positions is for 512 tokens.

    Some models with positions left read a text differently beside a longer one: with LongRoPE beyond
    `original_max_position_embeddings`, where attention chooses tokens by rank, or where a scale of attention follows
    columns (Llama 4). Rollout and update read the same text in different batches, so such lengths are beyond the limit.

    Args:
        model: The model; of a model with several modalities, the text part of its config is read.
        of: The half that is asked for, if it is an encoder-decoder whose halves differ.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> length_limit(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=24)))
        Limit(n_tokens=24, kind='positions', cure='')
    """
    half = getattr(model.config, of, None) if model.config.is_encoder_decoder else None
    config = half or model.config.get_text_config()  # models made of two, and T5Gemma, have a config of each half
    limits = [*_positions(model, config, of), *_selections(config), *_temperatures(config), *_long_ropes(config)]
    return min(limits, key=lambda limit: limit.n_tokens, default=None)


def _positions(model: PreTrainedModel, config: PretrainedConfig, of: Half) -> Iterator[Limit]:
    # Most configs with another name for the limit map the first of these to it (`attribute_map` of transformers'
    # GPT2Config); MPT and LED do not. XLNet, which has no limit, says -1.
    names = ("max_position_embeddings", "max_seq_len", f"max_{of}_position_embeddings")
    limit = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if limit is None or limit <= 0:
        return
    paddings = [
        module.padding_idx
        for name, module in model.named_modules()
        if "position" in name and getattr(module, "num_embeddings", None) == limit and module.padding_idx is not None
    ]
    yield Limit(int(limit) - max(paddings, default=-1) - 1, "positions")


def _selections(config: PretrainedConfig) -> Iterator[Limit]:
    for name in SELECTIONS:
        n_tokens = getattr(config, name, None)
        if n_tokens:
            yield Limit(n_tokens, f"tokens of {name}, beyond which its attention chooses tokens by rank")


def _temperatures(config: PretrainedConfig) -> Iterator[Limit]:
    """Yield the length from which transformers' `Llama4TextAttention` scales queries by the column of a batch.

    A row's tokens stand in other columns beside a longer row, in a decoding cache: `floor((column + 1) / floor_scale)`.
    """
    scale = getattr(config, "floor_scale", None)
    if scale and getattr(config, "attn_temperature_tuning", False):
        kind = "tokens below floor_scale, from which its attention scales by the columns of a batch"
        yield Limit(int(scale) - 1, kind, "or set attn_temperature_tuning=False in its config")


def _long_ropes(config: PretrainedConfig) -> Iterator[Limit]:
    """Yield the lengths beyond which transformers' `dynamic_rope_update` rotates all rows of a batch differently."""
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    by_kind_of_layer = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in by_kind_of_layer or [parameters]:
        if rope.get("rope_type") == "longrope" and list(rope["short_factor"]) != list(rope["long_factor"]):
            yield Limit(
                rope["original_max_position_embeddings"],
                "tokens of LongRoPE's short factors, beyond which all rows of a batch are rotated by the long ones",
                "or use the same factors at all lengths: set short_factor to long_factor in the config",
            )
