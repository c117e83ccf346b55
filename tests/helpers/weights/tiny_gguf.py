"""A tiny Llama as a GGUF file with its tokenizer, written by the package gguf, and the same model in transformers."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

END = "<|endoftext|>"  # GPT-2's tokenizer would add it behind the vocabulary
TOKENS = [END, "Ġ", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd"]  # Ġ is a space in the spelling of bytes
CONTROL, NORMAL = 3, 1  # `gguf.TokenType`
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
N_POSITIONS = 64


def tiny_llama() -> PreTrainedModel:
    """Return the model before its weights are rounded to 8 bits: large weights, so that logits differ clearly."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    limits = {"vocab_size": len(TOKENS), "max_position_embeddings": N_POSITIONS, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **limits, **ends, initializer_range=0.3, tie_word_embeddings=True))


def write_gguf(path: Path, architecture: str = "llama") -> Path:
    """Write the model as llama.cpp stores it, matrices in blocks of 8 bits (Q8_0); return the path."""
    import gguf  # of the extra `gguf`

    model = tiny_llama()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(N_POSITIONS)
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(model.config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL] + [NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b", "c d"])  # of one, transformers 5.10 makes a text
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embeddings
            continue
        layer, _, kind = name.rpartition(".")
        values, own = weight.numpy(), f"{names.get_name(layer)}.{kind}"
        if ".q_proj" in name or ".k_proj" in name:
            values = _permuted(values)
        if values.ndim == 2:
            eight_bits = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own, gguf.quants.quantize(values, eight_bits), raw_dtype=eight_bits)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permuted(values):
    """Return rows of queries or keys in llama.cpp's order (`LlamaModel.permute` of its convert_hf_to_gguf.py)."""
    n_heads, width = SHAPE["num_attention_heads"], values.shape[1]
    return values.reshape(n_heads, 2, -1, width).swapaxes(1, 2).reshape(values.shape)
