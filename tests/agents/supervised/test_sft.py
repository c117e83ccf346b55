"""`sft.tune`: the trained tokens of a text, packing, learning, resuming, and saved folders."""

import random
import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, TrainerCallback

from agents import Pretrained, word_tokenizer
from agents.small_models.training_loop import IGNORED
from agents.supervised import hf_trainer, sft
from agents.supervised.sft_data import Sample, collate, encode_sample, pack, words_of
from tests.helpers.models import tiny
from tests.textenv.prompts.test_chat import CHAT, CHATML, tokenizer_with
from textenv import CharTokenizer, TextEnv, demo

TOKENIZER = word_tokenizer(demo.vocabulary())
TEXTS = demo.reviews(120, seed=1)
PAIRS = [(" ".join(text.split()[:3]), " " + " ".join(text.split()[3:])) for text in TEXTS]
CONFIG = tiny("llama", vocab_size=len(TOKENIZER), initializer_range=0.1)


def tune(data, folder, lm=CONFIG, tokenizer=TOKENIZER, **kwargs):
    settings = {"n_epochs": 3, "learning_rate": 1e-2, "progress_bar": False, **kwargs}
    return sft.tune(lm, data, folder, tokenizer=tokenizer, **settings)


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_of_a_pair_the_reference_and_the_end_are_trained_and_of_a_text_all_that_something_predicts():
    pair = encode_sample(CharTokenizer(), ("ab", "cd"), 0, 99)
    text = encode_sample(CharTokenizer(), "abc", 0, 99)
    assert pair == [Sample([1, 2, 3, 4, 0], 2)] and text == [Sample([1, 2, 3, 0], 1)]
    labels = collate([pair, text])["labels"].tolist()
    assert labels == [[IGNORED, IGNORED, 3, 4, 0], [IGNORED, 2, 3, 0, IGNORED]]


def test_b8_what_is_too_long_keeps_the_prompts_end_and_the_references_start():
    assert encode_sample(CharTokenizer(), ("abcd", "ef"), 0, 5) == [Sample([3, 4, 5, 6, 0], 2)]
    assert encode_sample(CharTokenizer(), ("ab", "cdefgh"), 0, 4) == [Sample([2, 3, 4, 5], 1)]
    assert encode_sample(CharTokenizer(), "abcdefg", 0, 4) == [Sample([1, 2, 3, 4], 1), Sample([5, 6, 7, 0], 1)]


@pytest.mark.parametrize("opens", [False, True])
def test_a_chat_is_read_as_an_environment_reads_it(opens):
    """Also with a tokenizer that opens texts with BOS: the template writes what opens a chat."""
    tokenizer = tokenizer_with(CHATML, opens)
    [sample] = encode_sample(tokenizer, (CHAT, "hi"), 0, 999)
    env = TextEnv([CHAT], tokenizer, reward="zero")
    assert sample.ids == [*env.prompts[0].ids, *tokenizer.encode("hi", add_special_tokens=False), 0]
    assert sample.n_read == len(env.prompts[0].ids)


def test_a_chat_needs_a_template_and_gives_a_fresh_tokenizer_its_words(tmp_path):
    with pytest.raises(ValueError, match="Expected a tokenizer with a chat template for the prompt"):
        encode_sample(CharTokenizer(), (CHAT, "hi"), 0, 999)
    assert words_of((CHAT, "hi")) == "be briefhello therehi" and words_of(("a", "b")) == "ab" and words_of("a") == "a"


def test_the_gradient_of_a_pair_is_that_of_the_references_log_probability():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    batch = collate([[Sample([3, 4, 5, 6, 0], 3)], [Sample([7, 8], 1)]])  # two trained tokens, and one
    model(**batch).loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    first = model(input_ids=torch.tensor([[3, 4, 5, 6, 0]])).logits[0].log_softmax(-1)
    second = model(input_ids=torch.tensor([[7, 8]])).logits[0].log_softmax(-1)
    (-(first[2, 6] + first[3, 0] + second[0, 8]) / 3).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_packing_fits_samples_whole_into_rows():
    samples = [Sample([1] * n, 1) for n in (3, 5, 2, 6, 4)]
    rows = pack(samples, 8)
    assert [[len(sample.ids) for sample in row] for row in rows] == [[6, 2], [5, 3], [4]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral"])
def test_packed_texts_have_the_loss_and_gradient_of_padded_ones(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(family)).eval()
    samples = [Sample(np.random.default_rng(n).integers(1, 30, n).tolist(), 1 + n % 3) for n in (4, 9, 6, 5, 12)]
    rows = pack(samples, 16)
    assert len(rows) < len(samples)
    gradients = []
    for batch in (collate(rows), collate([[sample] for sample in samples])):
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert sft.mean_loss(model, rows) == pytest.approx(sft.mean_loss(model, [[s] for s in samples]), abs=1e-5)


def test_models_that_cannot_tell_packed_texts_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="BloomForCausalLM, in which they see each other: use packing=False"):
        tune(TEXTS, tmp_path / "m", lm=tiny("bloom", vocab_size=len(TOKENIZER)), packing=True, max_tokens=64)


@pytest.mark.parametrize("kwargs", [{}, {"packing": True, "max_tokens": 64, "batch_size": 4}], ids=["padded", "packed"])
def test_it_learns_and_the_folder_loads_with_transformers_alone(kwargs, tmp_path):
    result = tune(TEXTS[:100], tmp_path / "m", held_out=TEXTS[100:], n_epochs=8, **kwargs)
    assert result.held_out_loss < 0.6 * result.held_out_loss_before and result.train_loss < 0.6 * np.log(120)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        AutoTokenizer.from_pretrained(tmp_path / "m"),
    )
    rows = [encode_sample(tokenizer, text, tokenizer.eos_token_id, 128) for text in TEXTS[100:]]
    assert sft.mean_loss(model, rows) == pytest.approx(result.held_out_loss, abs=1e-5)
    assert model.config.use_cache and same(Pretrained(str(tmp_path / "m")).build().state_dict(), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_references_are_learned_and_without_a_learning_rate_they_are_not(tmp_path):
    result = tune(PAIRS[:100], tmp_path / "m", held_out=PAIRS[100:], n_epochs=8)
    off = tune(PAIRS[:100], tmp_path / "off", held_out=PAIRS[100:], learning_rate=0.0)
    assert result.held_out_loss < 0.6 * result.held_out_loss_before
    assert off.held_out_loss == pytest.approx(off.held_out_loss_before)


@pytest.mark.slow
def test_a_path_is_tuned_further_with_its_own_tokenizer(tmp_path):
    first = tune(TEXTS, tmp_path / "a", held_out=TEXTS[:20], n_epochs=1)
    second = tune(TEXTS, tmp_path / "b", lm=str(tmp_path / "a"), tokenizer=None, held_out=TEXTS[:20], n_epochs=1)
    assert second.held_out_loss_before == pytest.approx(first.held_out_loss, abs=1e-5)
    assert second.held_out_loss < first.held_out_loss
    assert second.perplexity(second.held_out_loss) == pytest.approx(np.exp(second.held_out_loss))


def test_a_config_without_tokenizer_gets_one_trained_on_the_texts(tmp_path):
    tune(["größe 12, grün!"] * 8, tmp_path / "m", lm=tiny(vocab_size=300), tokenizer=None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert tokenizer.decode(tokenizer.encode("größe 12")) == "größe 12" and len(tokenizer) <= 300
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_e8_after_ctrl_c_it_goes_on_to_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    config = tiny(vocab_size=len(TOKENIZER), resid_pdrop=0.1)  # dropout draws from the generators that a state saves
    tune(TEXTS, tmp_path / "whole", lm=config)

    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 10:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        real = hf_trainer.SealedTrainer
        press = lambda *a, **k: real(*a, **{**k, "callbacks": [*k["callbacks"], PressCtrlC()]})  # noqa: E731
        patch.setattr(hf_trainer, "SealedTrainer", press)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 11; `resume=True` continues"):
            tune(TEXTS, tmp_path / "parts", lm=config)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ValueError, match="arguments and data of the interrupted run"):
        tune(TEXTS[1:], tmp_path / "parts", lm=config, resume=True)
    result = tune(TEXTS, tmp_path / "parts", lm=config, resume=True)
    assert result.n_steps == 24 and same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.slow
def test_e10_equal_seeds_tune_the_same_and_global_generators_are_left_alone(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(TEXTS[:32], tmp_path / name, seed=seed, n_epochs=1)
    assert states() == before
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"data": []}, "at least one text, got none"),
        ({"data": [("", "good")]}, "prompts of at least one token, got ''"),
        ({"lm": Pretrained("./nowhere"), "tokenizer": None}, "`tokenizer` with a spec, got None"),
        ({"lm": T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)}, "encoder-decoder T5For"),
        ({"max_tokens": 200}, "128 positions, got up to 200 tokens"),
    ],
)
def test_what_cannot_be_tuned_is_refused(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tune(**{"data": TEXTS, "folder": tmp_path / "m", **kwargs})
    assert not (tmp_path / "m").exists()
