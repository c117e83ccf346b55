"""Sharded policies from folders: no process has the whole model in memory of its own, and weights are the file's."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agents import Sharded
from agents.models.pretrained import Pretrained, stored_type
from tests.helpers.processes import train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders of one model, by the type of its weights in the file."""
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=16,  # FSDP holds three gathered layers for a moment
        num_attention_heads=8,
        vocab_size=64,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, paths = LlamaForCausalLM(config), {}
    for dtype in (torch.bfloat16, torch.float32):  # in this order: both hold numbers of 16 bits
        paths[dtype] = tmp_path_factory.mktemp("models") / str(dtype)
        model.to(dtype).save_pretrained(paths[dtype])
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_process_has_all_weights_in_memory_while_it_loads(dtype, folders):
    for peak, n_bytes, is_same, types, config_type in train(2, "loaded", folders[dtype], Sharded(), timeout=120):
        assert is_same and types == {"torch.float32"} and config_type == torch.float32
        assert n_bytes > 100e6 and 0.4 * n_bytes < peak < n_bytes, peak / n_bytes
    alone = train(1, "loaded", folders[dtype], None, timeout=120)[0]
    assert alone[0] > alone[1] or dtype == torch.float32, "a control: one process converts them all"


def test_the_type_of_a_folder(folders, tmp_path):
    assert [stored_type(path) for path in folders.values()] == [torch.bfloat16, torch.float32]
    assert stored_type(tmp_path) is None
    built = Pretrained(str(folders[torch.bfloat16]))
    assert built.build(as_stored=True).dtype == torch.bfloat16 and built.config.dtype == torch.float32
    asked = Pretrained(str(folders[torch.float32]), dtype=torch.bfloat16)
    assert asked.build(as_stored=True).dtype == torch.bfloat16, "what the user asks for"
