"""Tiny random encoder-decoders, and the logits that their plain Transformers forward gives."""

from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, MarianConfig, PreTrainedConfig, PreTrainedModel, T5Config

from tests.helpers.models import N_POSITIONS, N_ROWS, N_TOKENS
from textenv.episodes.rules import SEPARATOR

T5 = {
    "vocab_size": N_ROWS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "initializer_factor": 1.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
HALVES = {
    f"{half}_{name}": value
    for half in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
}
BART = {
    **HALVES,
    "vocab_size": N_ROWS,
    "d_model": 16,
    "max_position_embeddings": N_POSITIONS,
    "init_std": 0.3,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "t5": (T5Config, T5),  # tied embeddings, for which T5 scales its logits
    "t5 untied": (T5Config, {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "bart": (BartConfig, BART),
    "marian": (MarianConfig, {**BART, "decoder_vocab_size": N_ROWS}),  # sinusoidal positions
}
CACHED = list(FAMILIES)


def tiny_seq2seq(family: str = "t5", **overrides: Any) -> PreTrainedConfig:
    """Return a config with two layers on either side and large weights, so that logits differ clearly."""
    cls, options = FAMILIES[family]
    return cls(**{**options, **overrides})


def expected_logits(model: PreTrainedModel, observations: Tensor) -> Tensor:
    """Return the logits (B, V) at the end of each row, from one full forward per row."""
    logits = []
    for observation in observations:
        boundary = int((observation == SEPARATOR).nonzero()[0])
        prompt, since = observation[:boundary][None], observation[boundary + 1 :]
        start = torch.tensor([model.config.decoder_start_token_id])
        written = torch.cat([start, since[since >= 0]])[None]
        with torch.no_grad():
            output = model(input_ids=prompt, decoder_input_ids=written, use_cache=False)
        logits.append(output.logits[0, -1, :N_TOKENS])
    return torch.stack(logits)
