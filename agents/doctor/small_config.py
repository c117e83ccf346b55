"""A config of a few small layers that keeps every switch of a large one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 40  # embedding rows: more than the tokens of a `CharTokenizer`, so that some rows belong to no token
POSITIONS = 128  # the longest sequence, where a config limits it
HIDDEN = 32  # the size of hidden states
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 8
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
WINDOW = 4  # tokens of sliding windows and chunks: fewer than in the texts of `exactness`
STATE = 8  # the size of states, ranks and kernels' groups
MAX_KINDS = 3  # of layers: two of each kind are kept, or one of each if there are more kinds
LARGE = 64  # the largest number of a field whose name fits no rule
DEFAULTS = {"head_dim": HEAD_SIZE, "num_key_value_heads": HEADS}  # in place of None, with which some classes compute
TEXT_TOKENS = {f"{name}_token_id" for name in ("bos", "eos", "pad", "decoder_start", "sep", "cls")}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")

# The fields that all configs have: all but two of them are names and formats, and do not change what a model computes.
OWN_FIELDS = {field.name for field in fields(PreTrainedConfig)} - {"is_encoder_decoder", "chunk_size_feed_forward"}

Rule = Callable[[int, PreTrainedConfig], int]


def _kv_heads(value: int, config: PreTrainedConfig) -> int:
    heads = [_value(config, name) for name in ("num_attention_heads", "n_head", "n_heads")]
    return HEADS if value in heads else min(value, KV_HEADS)


def _heads(value: int, config: PreTrainedConfig) -> int:
    """Return the number of heads; of a state-space model (Mamba 2), those of its expanded hidden state."""
    return 2 * HIDDEN // HEAD_SIZE if "expand" in vars(config) and "state_size" in vars(config) else HEADS


def _of_hidden(value: int, config: PreTrainedConfig) -> int:
    """Keep whole multiples of the hidden size (Zamba's attention reads two hidden states side by side)."""
    hidden = _value(config, "hidden_size")
    return HIDDEN * (value // hidden if isinstance(hidden, int) and value % hidden == 0 else 1)


def _head_size(value: int, config: PreTrainedConfig) -> int:
    """Keep twice hidden size / heads (Zamba), and heads that hold a part with positions and one without (DeepSeek)."""
    names = ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    hidden, heads, without, rotary = (_value(config, name) or 0 for name in names)
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return HEAD_SIZE
    is_sum = value > without > 0 and value > rotary
    return 2 * HEAD_SIZE if is_sum or value * heads == 2 * hidden > 0 else HEAD_SIZE


def _at_most(limit: int) -> Rule:
    return lambda value, config: min(value, limit)


def _always(size: int) -> Rule:
    return lambda value, config: size


# The first pattern that is found in a field's name gives its rule. Negative numbers, 0 and None do not change, so that
# what is switched off stays off.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"vocab_offset", _always(VOCABULARY - 8)),
    (r"^type_vocab_size|task_type_vocab", _at_most(4)),
    (r"^codebook_size", _at_most(HIDDEN)),
    (r"vocab", _always(VOCABULARY)),
    (r"^hidden_size_global|adapter_out_dim", _always(HIDDEN)),
    (r"^mamba_d_ssm", _always(2 * HIDDEN)),
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
    (r"(num|^n|attention)_heads?(_|$)|_n_heads$|linear_num\w*heads|^num_\w*heads$|heads$", _heads),
    (r"head_dim|^d_kv|^dim_head|kv_channels|head_size|^d_head|^rotary_dim", _head_size),
    (r"shared_experts?$|num_experts_per_group|zero_expert_num", _at_most(1)),
    # With fewer, attention chooses tokens by rank, and such texts are refused (`textenv.huggingface.positions`).
    (r"index_topk|keep_window|floor_scale", _at_most(POSITIONS)),
    (r"experts_per_tok|top_?k$|moe_k$|topk_blocks", _at_most(EXPERTS_PER_TOKEN)),
    (r"num_\w*experts|n_routed_experts|^num_experts|moe_num_experts", _at_most(EXPERTS)),
    (r"expert_capacity", _at_most(WINDOW)),
    (r"^n_group$|expert_group", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"n_groups|ngroups|num_\w*groups", _at_most(1)),
    (r"layers?$|^n_layer|^depth$|num_blocks|layers_per_stack", _at_most(2)),
    (r"^original_max_position", _always(POSITIONS // 2)),
    (r"position|^n_ctx|max_\w*len|max_source|max_target|context_length|max_distance|rel_extent", _always(POSITIONS)),
    (r"buckets", _at_most(8)),
    (r"tokenizer_chunk|audio_chunk", lambda value, config: value),  # samples of sound, not tokens
    (r"window|^(mamba_|attention_)?chunk_size|attn_chunk_length|block_size", _at_most(WINDOW)),
    (r"local_radius|^local_attention", _at_most(WINDOW)),
    (r"multiple_of|divisible_by", _at_most(STATE)),
    (r"rank|state_size|d_state|ssm_state", _at_most(STATE)),
    (r"kernel|conv_L|d_conv|width$|_per_|num_mel|num_channels|in_channels|channels$|image_size|patch", _at_most(16)),
    (r"intermediate|ffn|d_ff|dff|mlp|feed_forward|dim_ff|d_inner", _always(HIDDEN)),
    (r"hidden|d_model|embd|embed|emb_dim|lru_width|dim$|_size$|d_ssm|_dim_", _of_hidden),
)


def small_config(config: PreTrainedConfig, **overrides: Any) -> PreTrainedConfig:
    """Return a config of the same class and the same switches, with few layers of every kind, all of them small.

    Numbers change by rules on the names of their fields: sizes, counts of layers, heads and experts, windows,
    vocabularies and positions. Lists with an entry per layer are cut to two layers of each kind. Configs inside the
    config change likewise. All else stays: activations, biases, scales, caps, kinds of layers, dropout.

    Args:
        config: The config, of any size.
        **overrides: Fields that take these values.

    Example:
        >>> from transformers import Gemma2Config
        >>> small = small_config(Gemma2Config())
        >>> small.num_hidden_layers, small.layer_types[:2], small.final_logit_softcapping
        (4, ['sliding_attention', 'full_attention'], 30.0)
    """
    values = {name: _value(config, name) for name in _names(config)}
    kept = _kept_layers(values)
    small = {name: _small(name, value, config, kept) for name, value in values.items()}
    if kept:
        small |= {name: len(kept) for name in small if name in LAYER_COUNTS}
    # A config with differences between layers (Gemma 4's head sizes) writes them under this key.
    per_layer = config.to_dict().get("per_layer_config") or {}
    if per_layer and kept:
        own = {int(i): _small_part(part, config.per_layer_config[int(i)]) for i, part in per_layer.items()}
        small["per_layer_config"] = {new: own[old] for new, old in enumerate(kept) if old in own}
    result = type(config)(**{**small, **_special_tokens(config, small), **overrides})
    for name in vars(config).keys() - vars(result).keys():  # attributes without a field, such as DBRX's `rope_theta`
        if not name.startswith("_"):
            setattr(result, name, _small(name, vars(config)[name], config, kept))
    return result


def _small_part(part: dict[str, Any], layer: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields in which a layer differs from the others, made small; `layer` is the layer's own config."""
    return {name: _small(name, value, layer, []) for name, value in part.items()}


def _names(config: PreTrainedConfig) -> list[str]:
    return [field.name for field in fields(config) if field.name not in OWN_FIELDS]


def _value(config: PreTrainedConfig, name: str) -> Any:
    """Return a field, also one that transformers keeps under another name, or that differs between layers."""
    return vars(config).get(config.attribute_map.get(name, name))


def _n_layers(values: dict[str, Any]) -> int:
    """Return the number of layers; 0 if no field says it."""
    return next((int(values[name]) for name in LAYER_COUNTS if isinstance(values.get(name), int)), 0)


def _is_per_layer(value: Any, n_layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == n_layers and not _are_layers(value, n_layers)


def _are_layers(value: Any, n_layers: int) -> bool:
    """Return whether a list names layers by index: it rises and stays below their number."""
    if not isinstance(value, list | tuple) or not value or not all(type(entry) is int for entry in value):
        return False
    return all(a < b for a, b in itertools.pairwise(value)) and value[0] >= 0 and value[-1] < n_layers


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """Return two layers of each kind, in order, by all lists that describe layers; [] if no list does."""
    n_layers = _n_layers(values)
    lists = [value for value in values.values() if n_layers and _is_per_layer(value, n_layers)]
    sets = [set(value) for value in values.values() if _are_layers(value, n_layers) and len(value) < n_layers]
    if not lists and not sets:
        return []
    kinds = [(*(str(entries[i]) for entries in lists), *(i in layers for layers in sets)) for i in range(n_layers)]
    # Layers that share the keys and values of earlier ones are the last layers.
    n_sharing = values.get("num_kv_shared_layers") or 0
    kinds = [(*kind, i >= n_layers - n_sharing) for i, kind in enumerate(kinds)]
    nth = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    most = 2 if len(set(kinds)) <= MAX_KINDS else 1
    return [i for i in range(n_layers) if nth[i] < most]


def _small(name: str, value: Any, config: PreTrainedConfig, kept: list[int]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return small_config(value)
    if name.endswith(("token_id", "token_index", "token_ids")):
        return value
    n_layers = _n_layers({name: _value(config, name) for name in LAYER_COUNTS})
    if kept and name == "num_kv_shared_layers":
        return sum(i >= n_layers - value for i in kept)
    if kept and _is_per_layer(value, n_layers):
        return type(value)(_small(name, value[i], config, []) for i in kept)
    if kept and _are_layers(value, n_layers):
        return type(value)(kept.index(i) for i in value if i in kept)
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        return _small_rope(value)
    if value is None and name in DEFAULTS:
        return DEFAULTS[name]
    if type(value) is int and value > 0:
        rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
        return rule(value, config) if rule else min(value, LARGE)
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
    """Return ids of special tokens in the small vocabulary: 0 for those of text, those of images from its end."""
    special: dict[str, Any] = {}
    free = iter(range(VOCABULARY - 1, 0, -1))
    for name in values:
        if name in TEXT_TOKENS:
            special[name] = 0
        elif name.endswith(("forced_eos_token_id", "forced_bos_token_id")):
            special[name] = None
        elif name.endswith(("token_id", "token_index")) and isinstance(values[name], int):
            special[name] = next(free)
    if config.is_encoder_decoder:  # T5's config has no field for it
        special["decoder_start_token_id"] = 0
    return special
