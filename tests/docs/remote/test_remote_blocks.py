"""The models that a block server accepts: it runs their blocks exactly as the whole model does, and refuses others."""

import pytest
import torch
from transformers import GPTNeoConfig, PhiConfig, SmolLM3Config

from tests.helpers.models import COMMON, GATED, N_TOKENS, seldom
from tests.helpers.remote import (
    N_BLOCKS,
    N_POSITIONS,
    RemoteLM,
    Whole,
    blocks_of_all,
    decode,
    load_without_blocks,
    remote_chain,
    rows_of,
    save,
    served,
)

LENGTHS = [5, 1, 9, 3, 3]
FOUR = {**COMMON, **GATED, "num_hidden_layers": N_BLOCKS, "initializer_range": 0.3}
MIXED = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
KINDS_BY_LAYER = {
    # The second server holds the last block alone, whose kind differs from that of the first block.
    "qwen2": {"family": "qwen2", **MIXED},
    "smollm3": {"config": SmolLM3Config(**FOUR, no_rope_layers=[1, 0, 1, 0])},
}


@pytest.mark.parametrize("model", list(KINDS_BY_LAYER))
def test_layers_of_several_kinds_are_those_of_the_whole_model(model, tmp_path):
    with served(tmp_path, **KINDS_BY_LAYER[model]) as remote:
        lm, ids = remote.build(), rows_of(LENGTHS, 12)
        positions = torch.arange(len(ids)), torch.tensor(LENGTHS) + 2
        torch.testing.assert_close(lm(ids, *positions), Whole(remote, lm)(ids, *positions), atol=1e-4, rtol=1e-4)
        assert decode(lm, 1, 12) < 1e-4


NEO = {"num_layers": N_BLOCKS, "hidden_size": 16, "num_heads": 2, "attention_types": [[["global", "local"], 2]]}
REFUSED = {
    "gpt_neo": ({"config": GPTNeoConfig(**COMMON, **NEO)}, "Expected blocks that are alike, got `attention_layers`"),
    "gpt2": ({"family": "gpt2", "scale_attn_by_inverse_layer_idx": True}, r"with another block\.attn\.scaling: not"),
    "phi": ({"config": PhiConfig(**FOUR | {"num_key_value_heads": 2})}, "with a norm behind it, got .*PhiRotaryEmb"),
}


@pytest.mark.parametrize("model", list(REFUSED))
def test_a_model_whose_blocks_would_compute_something_else_is_refused(model, tmp_path):
    kwargs, error = REFUSED[model]
    with pytest.raises(ValueError, match=error), served(tmp_path, **kwargs):
        pass


def test_the_client_refuses_a_model_whose_norm_it_does_not_find(tmp_path):
    """A model without its final norm is refused, since the client would read and train without any blocks."""
    kwargs, error = REFUSED["phi"]
    model, n_blocks = load_without_blocks(str(save(tmp_path / "model", **kwargs)))
    with pytest.raises(ValueError, match=error):
        RemoteLM(model, remote_chain.Chain([], 0, remote_chain.Counter()), (), True, N_TOKENS, N_POSITIONS)
    assert n_blocks == N_BLOCKS


def test_a_model_saved_in_bfloat16_is_served_in_float32(tmp_path):
    with served(tmp_path, dtype=torch.bfloat16) as remote:
        assert all(weight.dtype == torch.float32 for weight in blocks_of_all(remote))
        lm, ids = remote.build(), rows_of(LENGTHS, 9)
        twin = Whole(remote, lm)
        assert next(twin.model.parameters()).dtype == torch.bfloat16
        twin.float()
        positions = torch.arange(len(ids)), torch.tensor(LENGTHS) - 1
        torch.testing.assert_close(lm(ids, *positions), twin(ids, *positions), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", seldom(["llama", "gpt2", "mistral", "gpt_neox", "qwen2"], 3))
def test_sessions_of_other_families_decode_as_full_reads_do(family, tmp_path):
    """Unlike BLOOM, these families have rotary or learned positions, or a sliding window."""
    with served(tmp_path, family) as remote:
        lm = remote.build()
        assert decode(lm, 1, 40) < 1e-4
        assert lm.chain.traffic["step", "messages"] > 0
