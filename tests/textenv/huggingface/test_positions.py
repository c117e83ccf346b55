"""The longest text that a model reads: positions, LongRoPE, attention by rank, and scales that follow columns."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    DogeConfig,
    DogeForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LEDConfig,
    LEDForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from agents.models.backbone import Backbone, check_fits
from agents.models.interface import LengthError
from agents.models.seq2seq import Seq2SeqBackbone
from textenv import CharTokenizer
from textenv.huggingface.positions import length_limit, n_positions
from textenv.metrics.model import Perplexity

BERT = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "is_decoder": True,
    "max_position_embeddings": 10,
}
HALVES = {
    "vocab_size": 40,
    "d_model": 8,
    **{f"{half}_layers": 1 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 8 for half in ("encoder", "decoder")},
}
PROPHET = {f"num_{half}_{part}": 2 for half in ("encoder", "decoder") for part in ("layers", "attention_heads")}

# The tokens that a model can read: 10 positions, of which the kin of RoBERTa and ProphetNet leave those up to
# padding_idx out; MPT has a name of its own; OPT and BART have two rows more than positions.
LIMITS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=10), 10),
    "bert": (BertLMHeadModel, BertConfig(**BERT), 10),
    "roberta": (RobertaForCausalLM, RobertaConfig(**BERT, pad_token_id=1), 8),
    "roberta, pad 0": (RobertaForCausalLM, RobertaConfig(**BERT, pad_token_id=0), 9),
    "xlm-roberta": (XLMRobertaForCausalLM, XLMRobertaConfig(**BERT, pad_token_id=1), 8),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=40,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=8,
            word_embed_proj_dim=8,
            max_position_embeddings=10,
            pad_token_id=1,
        ),
        10,
    ),
    "mpt": (MptForCausalLM, MptConfig(vocab_size=40, d_model=8, n_layers=1, n_heads=2, max_seq_len=10), 10),
    "bart, as many tokens": (
        BartForConditionalGeneration,
        BartConfig(**{**HALVES, "vocab_size": 10}, max_position_embeddings=10),
        10,
    ),
    "prophetnet": (
        ProphetNetForConditionalGeneration,
        ProphetNetConfig(
            vocab_size=40, hidden_size=8, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=10, **PROPHET
        ),
        9,
    ),
    "t5": (T5ForConditionalGeneration, T5Config(vocab_size=40, d_model=8, d_ff=8, num_layers=1, num_heads=1), None),
    "xlnet": (XLNetLMHeadModel, XLNetConfig(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=8), None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_positions_are_the_tokens_that_a_model_can_read_and_none_where_nothing_limits_them(name):
    model_class, config, expected = LIMITS[name]
    assert n_positions(model_class(config)) == expected


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta", "roberta, pad 0", "xlm-roberta", "opt", "mpt"])
def test_a_model_reads_as_many_tokens_as_it_has_positions_and_fails_at_one_more(name):
    model_class, config, limit = LIMITS[name]
    model = model_class(config).eval()
    ids = torch.arange(2, 3 + limit)[None]  # no padding
    model(ids[:, :limit])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


def test_a_long_text_is_cut_to_the_tokens_that_roberta_s_kin_can_read():
    """Of 10 positions 8 are for tokens: a ninth raised an IndexError."""
    model = RobertaForCausalLM(RobertaConfig(**BERT, pad_token_id=1))
    assert Perplexity(model, CharTokenizer())(["bcdefghijklm"], ["no"], [[]])["perplexity"].value > 1


def test_the_halves_of_an_encoder_decoder_may_have_limits_of_their_own():
    led = LEDConfig(**HALVES, attention_window=4, max_encoder_position_embeddings=16, max_decoder_position_embeddings=8)
    encoder, decoder = BertConfig(**{**BERT, "is_decoder": False, "max_position_embeddings": 20}), BertConfig(**BERT)
    pair = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    for model, expected in ((LEDForConditionalGeneration(led), (16, 8)), (EncoderDecoderModel(pair), (20, 10))):
        assert (n_positions(model, "encoder"), n_positions(model)) == expected
    backbone = Seq2SeqBackbone.__new__(Seq2SeqBackbone)
    torch.nn.Module.__init__(backbone)
    backbone.model = LEDForConditionalGeneration(led)
    backbone.check_length(16, 7)
    with pytest.raises(ValueError, match="fit the encoder's 16 positions, got up to 17 tokens"):
        backbone.check_length(17, 7)
    with pytest.raises(ValueError, match=r"fit the decoder's 8 positions, of which .*, got up to 8 tokens"):
        backbone.check_length(16, 8)


@pytest.mark.parametrize("name", ["mpt", "roberta", "xlnet"])
def test_a_limit_is_named_as_it_is_and_minus_one_is_none(name):
    """MPT and RoBERTa failed inside transformers; XLNet was refused for its "-1 positions"."""
    model_class, config, limit = LIMITS[name]
    model = model_class(config)
    check_fits(model, 40, limit or 1000)
    if limit:
        with pytest.raises(ValueError, match=f"fit the model's {limit} positions, got up to {limit + 1} tokens"):
            check_fits(model, 40, limit + 1)


def long_rope(long_factor):
    shape = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "initializer_range": 0.5,
    }
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": long_factor}
    positions = {"max_position_embeddings": 12, "original_max_position_embeddings": 6}
    return Phi3Config(**shape, **positions, vocab_size=40, pad_token_id=0, eos_token_id=0, rope_parameters=rope)


def test_case_02_texts_that_cross_the_border_of_longrope_are_refused_with_the_cure():
    """Beyond 6 tokens all rows of a batch are rotated by the long factors: the same text gets other logits."""
    model = Phi3ForCausalLM(long_rope([2.0, 3.0])).eval()
    ids = torch.arange(7)[None]
    alone, beside = model(ids[:, :6]).logits, model(ids).logits[:, :6]
    assert (alone - beside).abs().max() > 1e-4  # the fault of the model itself
    Backbone(model, 40, 6).check_length(4, 2)
    with pytest.raises(LengthError, match=r"6 tokens of LongRoPE's short .* up to 7 .* short_factor to long_factor"):
        Backbone(model, 40, 7)


def test_longrope_with_one_choice_of_factors_has_all_its_positions():
    model = Phi3ForCausalLM(long_rope([1.0, 1.0])).eval()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids[:, :6]).logits, model(ids).logits[:, :6])
    assert n_positions(model) == 12


def test_attention_that_chooses_tokens_by_rank_is_a_limit():
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = DogeForCausalLM(DogeConfig(**shape, vocab_size=40, keep_window_size=5, max_position_embeddings=12)).eval()
    assert length_limit(model).n_tokens == 5
    with pytest.raises(LengthError, match="the model's 5 tokens of keep_window_size, beyond which its attention"):
        Backbone(model, 40, 6)


def llama_4(**options):
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 4, "intermediate_size": 8, "intermediate_size_mlp": 8, "num_local_experts": 2}
    layers = {"layer_types": ["full_attention"], "no_rope_layers": [0], "moe_layers": [], "initializer_range": 0.5}
    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(**shape, **layers, vocab_size=40, floor_scale=8, **options)).eval()


def test_a_scale_that_follows_the_columns_of_a_batch_is_a_limit():
    """From the eighth column on Llama 4 scales queries, in whichever column a padded row has its tokens."""
    model, ids = llama_4(attn_scale=5.0), torch.arange(1, 5)[None]
    left = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], dim=1)
    mask, positions = (left > 0).long(), torch.tensor([[0] * 6 + [0, 1, 2, 3]])
    padded = model(left, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert (model(ids).logits[:, -1] - padded).abs().max() > 1e-3  # the fault of the model itself
    Backbone(model, 40, 7).check_length(4, 3)
    with pytest.raises(LengthError, match=r"7 tokens below floor_scale, .* got up to 8 .* attn_temperature_tuning=F"):
        Backbone(model, 40, 8)
    assert n_positions(llama_4(attn_temperature_tuning=False, max_position_embeddings=12)) == 12
