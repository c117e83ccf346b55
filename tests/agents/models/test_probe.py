"""The probe at construction: wrong models are refused by name, noise is off, and the fastest exact path is found."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BigBirdConfig,
    CTRLConfig,
    ElectraConfig,
    ErnieConfig,
    FalconConfig,
    MixtralConfig,
    NllbMoeConfig,
    OpenAIGPTConfig,
    PhimoeConfig,
    ProphetNetConfig,
    ReformerConfig,
    RemBertConfig,
    RobertaConfig,
    RoFormerConfig,
    SwitchTransformersConfig,
    XLMConfig,
)

from agents.models.backbone import Backbone
from agents.models.pretrained import backbone_class
from agents.models.probe import ABSENT, States, close, state_tolerance
from agents.models.trainable import checkpoint_layers
from tests.helpers.models import COMMON, GATED, LAYERS, N_POSITIONS, N_TOKENS, few, tiny, tiny_mixture
from tests.helpers.seq2seq import tiny_seq2seq

BERT = {**LAYERS, **COMMON, "intermediate_size": 32, "max_position_embeddings": N_POSITIONS}
KIN = {
    "bert": (BertConfig, BERT),
    "roberta": (RobertaConfig, BERT),
    "electra": (ElectraConfig, {**BERT, "embedding_size": 16}),
    "ernie": (ErnieConfig, BERT),
    "roformer": (RoFormerConfig, {**BERT, "embedding_size": 16}),
    "big_bird": (BigBirdConfig, {**BERT, "attention_type": "original_full"}),
    "rembert": (RemBertConfig, {**BERT, "input_embedding_size": 8, "output_embedding_size": 8}),
}
HALVES = {
    **{f"{half}_{part}": size for half in ("encoder", "decoder") for part, size in (("layers", 2), ("ffn_dim", 32))},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
}
PROPHET = {
    **{f"num_{half}_{part}": 2 for half in ("encoder", "decoder") for part in ("layers", "attention_heads")},
    **{f"{half}_ffn_dim": 32 for half in ("encoder", "decoder")},
}
START = {"decoder_start_token_id": 0, "init_std": 0.3}
# Models that draw random numbers in training mode, each under a name of its own.
NOISY = {
    "gpt2, dropout": lambda: tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "opt, layer drop": lambda: tiny("opt", layerdrop=0.5, dropout=0.5),
    "mixtral, router jitter": lambda: MixtralConfig(
        **{**GATED, **COMMON}, num_local_experts=4, router_jitter_noise=0.5, initializer_range=0.3
    ),
    "phimoe, sampled experts": lambda: PhimoeConfig(
        **{**GATED, **COMMON}, num_local_experts=4, router_jitter_noise=0.5, initializer_range=0.3
    ),
    "bart, dropout and layer drop": lambda: tiny_seq2seq("bart", dropout=0.5, decoder_layerdrop=0.5),
    "switch, jitter": lambda: SwitchTransformersConfig(
        **COMMON, **{k: START[k] for k in START if k != "init_std"}, d_model=16, d_kv=8, d_ff=32, num_heads=2,
        num_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, router_jitter_noise=0.5,
    ),
    "nllb-moe, dropped tokens": lambda: NllbMoeConfig(
        **COMMON, **START, **HALVES, d_model=16, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
        expert_capacity=64, moe_token_dropout=0.5, max_position_embeddings=N_POSITIONS,
    ),
}  # fmt: skip


def build(config):
    torch.manual_seed(0)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(config)


def read(backbone):
    """Return the states of the probe's own positions."""
    ids, *positions = backbone.probe_inputs()
    return States(*backbone(ids, *positions))


# Causality


@pytest.mark.parametrize("initializer_range", [0.02, 0.3])
@pytest.mark.parametrize("name", few(KIN, 2))
def test_f7_a_bidirectional_model_is_refused_with_the_flag_that_makes_it_causal(name, initializer_range):
    config_class, options = KIN[name]
    model = build(config_class(**options, initializer_range=initializer_range))
    with pytest.raises(ValueError, match=rf"a causal model, got {type(model).__name__}.* set is_decoder=True in"):
        Backbone(model, N_TOKENS, 16)
    Backbone(build(config_class(**options, initializer_range=initializer_range, is_decoder=True)), N_TOKENS, 16)


def test_f7_xlm_is_refused_with_its_own_flag():
    shape = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 40}
    with pytest.raises(ValueError, match="set causal=True in its config"):
        Backbone(build(XLMConfig(**shape, pad_index=39, pad_token_id=39)), N_TOKENS, 16)
    Backbone(build(XLMConfig(**shape, pad_index=39, pad_token_id=39, causal=True)), N_TOKENS, 16)
    # It counts the tokens of a row without those that equal pad, and leaves out as many at the end.
    with pytest.raises(ValueError, match=r"reads its pad token like any other, .* got XLMWithLMHeadModel"):
        Backbone(build(XLMConfig(**shape, pad_index=2, pad_token_id=2, causal=True)), N_TOKENS, 16)


def test_f7_prophetnet_is_refused():
    """Its head reads two streams at once, and its predictions at a token change with the length of the row."""
    config = ProphetNetConfig(**COMMON, **START, **PROPHET, hidden_size=16, max_position_embeddings=N_POSITIONS)
    with pytest.raises(ValueError, match=r"got ProphetNetForConditionalGeneration: .* run on .*\(2, 2, 4, 16\)"):
        backbone_class(build(config))(build(config), N_TOKENS, 16)


def test_f7_a_model_that_looks_ahead_without_a_flag_is_refused():
    model = build(tiny("llama"))
    model.model.norm.register_forward_hook(lambda module, args, out: out + 0.1 * out.mean(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="switch bidirectional attention off in its config"):
        Backbone(model, N_TOKENS, 16)


def test_f7_a_model_whose_rows_see_each_other_is_refused():
    model = build(tiny("llama"))
    model.model.norm.register_forward_hook(lambda module, args, out: out + 0.1 * out.mean(dim=0, keepdim=True))
    with pytest.raises(ValueError, match=r"whatever rows are beside it, got LlamaForCausalLM: it gives"):
        Backbone(model, N_TOKENS, 16)


# Noise


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a6_no_kind_of_noise_is_left_in_training_mode(name, checkpointing):
    config = NOISY[name]()
    plain = build(config).train()
    model = copy.deepcopy(plain)
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            pytest.skip("the model has no activation checkpointing")
        checkpoint_layers(model)
    backbone = backbone_class(model)(model, N_TOKENS, 16)
    expected = read(backbone.eval())
    backbone.train()
    for _ in range(3):
        hidden, logits = read(backbone)
        torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(logits.square().sum(), model.get_output_embeddings().weight)
    backbone.eval()
    (in_evaluation,) = torch.autograd.grad(read(backbone).logits.square().sum(), model.get_output_embeddings().weight)
    torch.testing.assert_close(gradient, in_evaluation, atol=1e-4, rtol=1e-4)
    # The control: transformers' own training mode does draw.
    ids, _, _, *n_prompt = backbone.probe_inputs()
    twice = []
    for _ in range(2):
        backbone.model = plain  # which `Backbone` has not touched
        twice.append(torch.cat([backbone.plain_logits(ids, *(n_prompt or [None])) for _ in range(4)]))
    assert not torch.equal(*twice)


def test_a6_checkpointed_layers_are_recomputed_and_not_in_training_mode():
    model = build(tiny("opt", dropout=0.5))
    checkpoint_layers(model)
    backbone = Backbone(model, N_TOKENS, 16).train()
    modes = []
    layer = model.model.decoder.layers[0]
    layer.fc1.register_forward_hook(lambda module, args, out: modes.append((layer.training, torch.is_grad_enabled())))
    read(backbone).logits.sum().backward()
    assert modes == [(False, True)] * 2  # in the forward pass and in the backward pass
    assert layer.training


def test_f7_noise_in_every_mode_is_refused():
    model = build(tiny())
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: functional.dropout(out, 0.1))
    with pytest.raises(ValueError, match=r"gives other logits|computes the same in every forward"):
        Backbone(model, N_TOKENS, 16)


def test_f7_another_result_in_training_mode_is_refused():
    model = build(tiny())
    calls = []

    def hook(module, args, out):
        calls.append(1)
        return out * 1.01 if torch.is_grad_enabled() is False and model.training_flag() else out

    backbone = Backbone(model, N_TOKENS, 16)
    model.training_flag = lambda: backbone.training
    model.transformer.ln_f.register_forward_hook(hook)
    from agents.models.probe import probe

    with pytest.raises(ValueError, match="computes the same in every forward, got GPT2LMHeadModel"):
        probe(backbone)
    assert calls


# Numbers


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_f7_damaged_weights_are_refused(value):
    model = build(tiny())
    model.transformer.ln_f.weight.data.fill_(value)
    with pytest.raises(ValueError, match="Expected finite logits, got NaN or infinity from GPT2LMHeadModel"):
        Backbone(model, N_TOKENS, 16)


def test_a_forward_that_fails_is_refused_with_its_reason():
    model = build(tiny())
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: out @ torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"got GPT2LMHeadModel, whose forward fails on 4 .* RuntimeError: mat1"):
        Backbone(model, N_TOKENS, 16)


def test_tokens_that_the_model_rules_out_do_not_hide_differences():
    ruled_out = torch.tensor([[0.0, 1.0, torch.finfo(torch.float32).min]])
    assert close(ruled_out, ruled_out.clone()) and not close(ruled_out + torch.tensor([0.5, 0.0, 0.0]), ruled_out)
    assert not close(torch.tensor([[0.0, 1.0, 2.0]]), ruled_out)  # a token that should be ruled out is not
    states = States(torch.ones(1, 2), ruled_out)
    assert not states.differ((torch.ones(1, 2), ruled_out.clone()), 1e-4)
    assert states.differ((torch.ones(1, 2), ruled_out.clamp(min=2 * ABSENT) + 0.5), 1e-4)
    assert states.differ((torch.full((1, 2), torch.nan), ruled_out), 1e-4)
    assert states.differ((torch.ones(1, 2) * 1.001, ruled_out), 1e-4)


def test_the_tolerance_follows_the_type_of_the_weights():
    model = build(tiny())
    assert state_tolerance(model) == 1e-4
    assert state_tolerance(model.half()) == 0.05
    assert state_tolerance(model.bfloat16()) == 8 * 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_f7_rounding_in_16_bits_is_no_reason_to_refuse(name, dtype):
    """SmolLM2-135M in float16 differs by 1.4 % from width to width, and was said to read its pad token otherwise."""
    model = build(tiny(name)).to(dtype)
    norm = model.model.norm if name == "llama" else model.model.decoder.final_layer_norm
    norm.register_forward_hook(lambda module, args, out: out * (1 + 0.02 / out.shape[1] + 0.01 / len(out)))
    backbone = Backbone(model, N_TOKENS, 16)
    assert backbone.is_cacheable and backbone.head_is_linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", few(KIN, 1))
def test_f7_in_16_bits_too_a_fresh_bidirectional_model_is_refused(name, dtype):
    """A later token moves its states by less than 16 bits round, but batches of the same shape round alike."""
    config_class, options = KIN[name]
    with pytest.raises(ValueError, match=r"a causal model, got .* set is_decoder=True in"):
        Backbone(build(config_class(**options)).to(dtype), N_TOKENS, 16)
    Backbone(build(config_class(**options, is_decoder=True)).to(dtype), N_TOKENS, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_f7_experts_that_round_otherwise_beside_other_tokens_are_no_reason_to_refuse(dtype):
    Backbone(build(tiny_mixture()).to(dtype), N_TOKENS, 16)


def test_f7_a_backward_pass_that_fails_is_refused():
    shape = {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 32}
    config = ReformerConfig(**shape, **COMMON, attn_layers=["local", "local"], axial_pos_embds=False, is_decoder=True)
    with pytest.raises(ValueError, match=r"can be trained, got ReformerModelWithLMHead, whose backward pass"):
        Backbone(build(config), N_TOKENS, 16)


def test_a_model_that_scales_its_embedded_tokens_in_place_can_be_trained():
    Backbone(build(CTRLConfig(**COMMON, n_embd=16, dff=32, n_layer=2, n_head=2, n_positions=32)), N_TOKENS, 16)


# Fallbacks: row-wise attention, new rows in a step, the cache itself


@pytest.mark.parametrize("alibi", [False, True])
def test_falcon_decodes_from_a_cache_without_attention_by_row(alibi):
    """Falcon's own attention class fails on a mask of fewer columns than keys."""
    config = FalconConfig(**LAYERS, **COMMON, num_kv_heads=2, alibi=alibi, initializer_range=0.3)
    backbone = Backbone(build(config), N_TOKENS, 16)
    assert (backbone.is_cacheable, backbone.attends_by_row, backbone.takes_new_rows) == (True, False, False)


def test_a_model_whose_cache_fails_runs_without_one_and_says_why():
    config = OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
    with pytest.warns(UserWarning, match=r"OpenAIGPTLMHeadModel does not .*RuntimeError: .*without a cache"):
        backbone = Backbone(build(config), N_TOKENS, 16)
    assert backbone.new_cache() is None and "RuntimeError" in backbone.no_cache_because


def test_the_fast_path_of_a_usual_model_is_not_lost():
    backbone = Backbone(build(tiny("llama")), N_TOKENS, 16)
    assert (backbone.is_cacheable, backbone.attends_by_row, backbone.takes_new_rows) == (True, True, True)
    assert backbone.no_cache_because == ""
