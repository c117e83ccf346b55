"""The examination of one model by its config: small configs worked out by hand, and rows of models right and wrong."""

import pytest
import torch
from transformers import (
    BartConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    Phi3Config,
    Qwen3NextConfig,
    XLNetConfig,
)

from agents.doctor.exactness import Exactness, exactness_agent
from agents.doctor.model_row import ModelRow, examine_config
from agents.doctor.sharp_model import SharpModel
from agents.doctor.small_config import small_config
from agents.models.backbone import Backbone
from agents.models.kept_states import KeptStates

ROUNDING = 1e-4


def values(config, names):
    return [getattr(config, name) for name in names.split()]


def test_sizes_become_small_and_switches_stay():
    small = small_config(
        LlamaConfig(num_attention_heads=32, num_key_value_heads=8, attention_bias=True, rms_norm_eps=1e-3)
    )
    assert values(small, "hidden_size intermediate_size num_hidden_layers vocab_size") == [32, 32, 2, 40]
    assert values(small, "num_attention_heads num_key_value_heads head_dim") == [4, 2, 8]
    assert values(small, "attention_bias rms_norm_eps hidden_act max_position_embeddings") == [True, 1e-3, "silu", 128]
    assert values(small, "bos_token_id eos_token_id pad_token_id") == [0, 0, 0]
    assert small_config(LlamaConfig(num_attention_heads=32, num_key_value_heads=32)).num_key_value_heads == 4
    gpt2 = small_config(GPT2Config(chunk_size_feed_forward=2, tie_word_embeddings=False, scale_attn_weights=False))
    assert values(gpt2, "chunk_size_feed_forward tie_word_embeddings scale_attn_weights") == [2, False, False]


def test_two_layers_of_each_kind_stay_in_order():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    small = small_config(Gemma2Config(num_hidden_layers=12, layer_types=kinds * 2, sliding_window=4096))
    assert small.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert values(small, "num_hidden_layers sliding_window final_logit_softcapping") == [4, 4, 30.0]
    assert small_config(Qwen3NextConfig()).layer_types == ["linear_attention"] * 2 + ["full_attention"] * 2


def test_experts_ranks_and_rotary_factors_become_small():
    small = small_config(DeepseekV3Config())
    assert values(small, "n_routed_experts num_experts_per_tok n_group topk_group") == [4, 2, 2, 1]
    assert values(small, "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim") == [8, 8, 8, 8, 8]
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    small = small_config(Phi3Config(rope_parameters={**rope, "original_max_position_embeddings": 4096}))
    assert small.rope_parameters["long_factor"] == [2.0] * 4 and small.rope_parameters["rope_type"] == "longrope"


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    config, before = small_config(GPT2Config()), torch.get_rng_state()
    first, second, other = (SharpModel(config, seed).build().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_exact_model():
    row = examine_config(GPT2Config())
    assert row.cells == ("exact", "yes", "sdpa", "shared, separate", "c_attn, c_fc, c_proj", "")
    assert max(row.differences.values()) < ROUNDING and row.sensitivity > 0.1
    for name in ("rollout", "ratio", "values", "padding", "gradient"):
        assert {name, f"{name} after an update"} <= row.differences.keys()
    assert "LoRA's ratio after an update" in row.differences


def test_an_encoder_decoder_has_no_separate_critic():
    row = examine_config(BartConfig(decoder_start_token_id=0))
    assert (row.verdict, row.cache, row.critic) == ("exact", "yes", "shared"), str(row)


def test_a_refused_model_says_why():
    row = examine_config(XLNetConfig())
    assert row.verdict == "refused" and row.remarks.startswith("Expected ")
    assert str(row).splitlines()[0] == "result     refused"


def test_another_distribution_is_found():
    """Negative control: a policy that samples at another temperature is equal to itself, and not to the model."""
    spec = SharpModel(small_config(GPT2Config()))
    exactness = Exactness(spec.build())
    exactness_agent(spec, temperature=0.9).learn(40, callback=exactness)
    assert exactness.differences["ratio"] < ROUNDING < 0.01 < exactness.differences["rollout"]
    assert exactness.differences["gradient"] > 0.01


@pytest.mark.parametrize("error", [RuntimeError("the tensors do not fit"), ValueError("Expected a tensor, got none.")])
def test_an_error_of_the_model_is_no_refusal(error, monkeypatch):
    """Its words may be like ours: the line that raised it is not. An error on short texts is refused by the probe."""
    forward = GPT2Model.forward

    def broken(self, input_ids, **kwargs):
        if input_ids.shape[1] > 8:
            raise error
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", broken)
    assert examine_config(GPT2Config()).verdict == "failed"


def test_the_lines_of_a_row():
    row = ModelRow("exact", "no", "eager", "shared", "", "slow", {"ratio": 2e-6, "rollout": 1e-6})
    assert str(row).splitlines() == [
        "result     exact",
        "cache      no",
        "attention  eager",
        "critic     shared",
        "remarks    slow",
        "measured   at most 2.0e-06 from the model alone, over 2 rollouts",
    ]


def shared_parts(monkeypatch, factor=1.0):
    """Return a list that gets the chunk of each forward with shared prompts, whose states are multiplied.

    Not those of the probe, which has prompts of two tokens: it would see that they are wrong.
    """
    parts, read_shared = [], Backbone.read_shared

    def read(self, shared):
        hidden, logits = read_shared(self, shared)
        if shared.prompts.shape[1] <= 2:
            return hidden, logits
        parts.append(shared)
        return factor * hidden, logits

    monkeypatch.setattr(Backbone, "read_shared", read)
    return parts


def test_f3_shared_prompts_are_examined(monkeypatch):
    """Two distinct prompts of different length in one forward, so that the shorter one is padded on the left."""
    parts = shared_parts(monkeypatch)
    assert examine_config(GPT2Config()).verdict == "exact"
    padded = [part for part in parts if len(part.prompts) == 2 and part.completions[0].mask is not None]
    assert len(padded) >= 8  # two rollouts, of all weights and of LoRA: scores, padding and gradients


def test_f3_a_shared_update_that_is_wrong_is_seen(monkeypatch):
    shared_parts(monkeypatch, 1.01)
    row = examine_config(GPT2Config())
    assert row.verdict == "wrong" and row.differences["ratio"] > ROUNDING and row.differences["gradient"] > 1e-3


def test_f1_kept_keys_that_are_wrong_are_seen(monkeypatch):
    taken = []
    take = KeptStates.take
    monkeypatch.setattr(
        KeptStates, "take", lambda self, key: taken.append(key) or [(k, 2 * v) for k, v in take(self, key)]
    )
    row = examine_config(GPT2Config())
    assert row.verdict == "wrong" and row.differences["rollout"] > ROUNDING
    assert any(len(key) >= 16 * 8 for key in taken), "a long prompt among them"


def test_a_family_that_does_not_share_exactly_reads_whole_sequences(monkeypatch):
    """The probe of a new model decides it, without a word from anybody."""
    parts = shared_parts(monkeypatch)
    monkeypatch.setattr("agents.models.prompt_probe.shares_prompts", lambda *_: False)
    assert examine_config(GPT2Config()).verdict == "exact" and not parts
