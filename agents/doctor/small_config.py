"""A config of a few small layers that keeps every switch of a large one: its family in little."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 40  # embedding rows: more than the tokens of a `CharTokenizer`, so that rows beyond these are met as well
POSITIONS = 128  # the longest sequence, where a config limits it
HIDDEN = 32  # the size of hidden states
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 8
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
WINDOW = 4  # tokens of sliding windows and chunks: fewer than the rows of an examination have
STATE = 8  # the size of states, ranks and kernels' groups
MAX_LAYERS = 4
LARGE = 64  # numbers beyond it, of names that no rule knows, become `HIDDEN`

OWN_FIELDS = {field.name for field in fields(PreTrainedConfig)} - {"is_encoder_decoder"}  # of every config
LAYER_COUNTS = re.compile(r"^(num_hidden|num|n|encoder|decoder|num_encoder|num_decoder|\w+)_?layers?$|^depth$|blocks$")

Rule = Callable[[int, PreTrainedConfig], int]


def _kv_heads(value: int, config: PreTrainedConfig) -> int:
    heads = (
        getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or getattr(config, "n_heads", 0)
    )
    return HEADS if value == heads else 1 if value == 1 else KV_HEADS


def _of_hidden(value: int, config: PreTrainedConfig) -> int:
    """Keep whole multiples of the hidden size (Zamba's attention reads two hidden states side by side)."""
    hidden = getattr(config, "hidden_size", None) or value
    return HIDDEN * max(1, round(value / hidden)) if isinstance(hidden, int) else HIDDEN


def _head_size(value: int, config: PreTrainedConfig) -> int:
    """Keep whole multiples of hidden size / heads."""
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return HEAD_SIZE
    return HEAD_SIZE * (2 if value * heads == 2 * hidden else 1)


def _at_most(limit: int) -> Rule:
    return lambda value, config: min(value, limit)


def _always(size: int) -> Rule:
    return lambda value, config: size


# The first pattern that is found in a name decides. Negative numbers, 0 and None stay, so switches stay as they are.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"vocab_offset", _always(VOCABULARY - 8)),
    (r"^type_vocab_size|task_type_vocab", _at_most(4)),
    (r"vocab|codebook_size$", _always(VOCABULARY)),
    (r"sparse_step|interval|period|every_n|layer_group_size|cross_attention_frequency", _at_most(2)),
    (r"offset$|layer_start_index|first_k_dense|num_dense_layers|max_window_layers|^num_global_layers", _at_most(1)),
    (r"num_sparse_\w+_layers", _at_most(1)),
    (r"layer_end_index", _always(1)),
    (r"kv_heads|key_value_heads|kv_n_heads|query_groups", _kv_heads),
    (r"linear_num_key_heads", _always(KV_HEADS)),
    (r"^mamba_n_heads|^mamba_num_heads", _always(2 * HIDDEN // HEAD_SIZE)),
    (r"^n_mamba_heads", _at_most(2)),
    (r"mamba_head_?dim|mamba_d_head", _always(HEAD_SIZE)),
    (r"heads?_per_ngram", _at_most(2)),
    (r"(num|^n|attention)_heads?(_|$)|_n_heads$|linear_num\w*heads|^num_\w*heads$|heads$", _always(HEADS)),
    (r"head_dim|^d_kv|^dim_head|kv_channels|head_size|^d_head|^rotary_dim", _head_size),
    (r"shared_experts?$|num_experts_per_group|zero_expert_num", _at_most(1)),
    (r"experts_per_tok|top_?k$|moe_k$|topk_blocks|index_topk", _at_most(EXPERTS_PER_TOKEN)),
    (r"num_\w*experts|n_routed_experts|^num_experts|moe_num_experts", _at_most(EXPERTS)),
    (r"expert_capacity", _always(POSITIONS)),
    (r"^n_group$|expert_group", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"n_groups|ngroups|num_\w*groups", _at_most(1)),
    (r"layers?$|^n_layer|^depth$|num_blocks|layers_per_stack", _at_most(2)),
    (r"position|^n_ctx|max_\w*len|max_source|max_target|context_length|max_distance|rel_extent", _always(POSITIONS)),
    (r"buckets", _at_most(8)),
    (r"window|chunk_(size|length)|block_size|local_radius|^local_attention|chunk_length", _at_most(WINDOW)),
    (r"multiple_of|divisible_by", _at_most(STATE)),
    (r"rank|state_size|d_state|ssm_state", _at_most(STATE)),
    (r"kernel|conv_L|d_conv|width$|_per_|num_mel|num_channels|in_channels|channels$|image_size|patch", _at_most(16)),
    (r"intermediate|ffn|d_ff|dff|mlp|feed_forward|dim_ff|d_inner", _always(HIDDEN)),
    (r"hidden|d_model|embd|embed|emb_dim|lru_width|dim$|_size$|d_ssm|_dim_", _of_hidden),
)


def small_config(config: PreTrainedConfig, **overrides: Any) -> PreTrainedConfig:
    """Return a config of the same class and the same switches, with few layers of every kind, all of them small.

    Numbers change by rules on the names of their fields: sizes, counts of layers, heads and experts, windows,
    vocabularies and positions. Lists with an entry per layer are cut to one layer of each kind. Configs inside the
    config change likewise. All else stays: activations, biases, scales, caps, kinds of layers, dropout.

    Args:
        config: The config, of any size.
        **overrides: Fields that take these values.

    Example:
        >>> from transformers import Gemma2Config
        >>> small = small_config(Gemma2Config())
        >>> small.num_hidden_layers, small.layer_types, small.final_logit_softcapping
        (2, ['sliding_attention', 'full_attention'], 30.0)
    """
    names = [field.name for field in fields(config) if field.name not in OWN_FIELDS]
    values = {name: getattr(config, name) for name in names}
    kept = _kept_layers(values)
    small = {name: _small(name, value, config, kept) for name, value in values.items()}
    if kept:
        small |= {name: len(kept) for name in small if name in ("num_hidden_layers", "n_layer", "num_layers")}
    special = _special_tokens(config, small)
    return type(config)(**{**small, **special, **overrides})


def _n_layers(values: dict[str, Any]) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(values.get(name), int):
            return int(values[name])
    return None


def _is_per_layer(value: Any, n_layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == n_layers and not _are_layers(value, n_layers)


def _are_layers(value: Any, n_layers: int) -> bool:
    """Return whether a list names layers by index: it rises and stays below their number."""
    if not isinstance(value, list | tuple) or not value or not all(type(entry) is int for entry in value):
        return False
    return all(a < b for a, b in zip(value, value[1:], strict=False)) and value[0] >= 0 and value[-1] < n_layers


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """Return the first layer of each kind, by all lists that describe layers; [] if no list does."""
    n_layers = _n_layers(values)
    if n_layers is None:
        return []
    lists = [value for value in values.values() if _is_per_layer(value, n_layers)]
    sets = [set(value) for value in values.values() if _are_layers(value, n_layers) and len(value) < n_layers]
    if not lists and not sets:
        return []
    kinds = [(*(str(entries[i]) for entries in lists), *(i in layers for layers in sets)) for i in range(n_layers)]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:MAX_LAYERS]
    if len(first) == 1:
        first = [0, 1] if n_layers > 1 else [0]
    # Layers that share the keys and values of earlier ones are the last layers: one of each kind more.
    shared = values.get("num_kv_shared_layers") or 0
    if shared:
        own, sharing = range(n_layers - shared), range(n_layers - shared, n_layers)
        parts = [{kinds[i]: i for i in reversed(part)}.values() for part in (own, sharing)]
        first = sorted(i for part in parts for i in part)
    return first


def _small(name: str, value: Any, config: PreTrainedConfig, kept: list[int]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return small_config(value)
    if name.endswith(("token_id", "token_index", "token_ids")):
        return value
    n_layers = _n_layers({field.name: getattr(config, field.name) for field in fields(config)})
    if n_layers is not None and kept:
        if name == "num_kv_shared_layers" and value:
            return sum(i >= n_layers - value for i in kept)
        if _is_per_layer(value, n_layers):
            return type(value)(_small(name, value[i], config, []) for i in kept)
        if _are_layers(value, n_layers):
            return type(value)(kept.index(i) for i in value if i in kept)
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        return _small_rope(value)
    if type(value) is int and value > 0:
        for pattern, rule in RULES:
            if re.search(pattern, name):
                return rule(value, config)
        return HIDDEN if value > LARGE else value
    return value


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters for the small head size; those of longer texts keep their kind."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = _small_rope(value)
        elif name == "mrope_section" and value is not None:
            small[name] = [HEAD_SIZE // 2 - 2, 1, 1]
        elif name in ("short_factor", "long_factor") and value is not None:
            small[name] = list(value)[: HEAD_SIZE // 2]
        elif name == "original_max_position_embeddings" and value is not None:
            small[name] = POSITIONS // 2
        else:
            small[name] = value
    return small


def _special_tokens(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Return ids of special tokens inside the small vocabulary: 0 for those of text, others beyond the text's tokens."""
    special: dict[str, Any] = {}
    free = iter(range(VOCABULARY - 1, 0, -1))
    for name in values:
        if name in (
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "decoder_start_token_id",
            "sep_token_id",
            "cls_token_id",
        ):
            special[name] = 0
        elif name.endswith(("forced_eos_token_id", "forced_bos_token_id")):
            special[name] = None
        elif name.endswith(("token_id", "token_index")) and isinstance(values[name], int):
            special[name] = next(free)
    if config.is_encoder_decoder:  # T5's config has no field for it
        special["decoder_start_token_id"] = 0
    return special
