"""The reward `Similarity`, compared with cosines from the same tiny model's hidden states."""

import copy
import pickle

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from agents import evaluate, word_tokenizer
from tests.helpers.rewards import rows, scores
from tests.helpers.training import tiny_agent, tiny_config
from textenv import TextEnv
from textenv.rewards import Scale, make_reward
from textenv.rewards.similarity import Similarity

WORDS = ["a", "good", "bad", "film", "plot", "p"]
TEXTS = ["a good film", "bad", "plot plot a good film a bad plot", "film"]
REFERENCES = ["a bad film", "good plot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a sentence-transformers model: a BERT of two layers, and the mean over tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    plain, path = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=8, initializer_range=0.5, max_position_embeddings=24, pad_token_id=0, **shape)
    BertModel(config).save_pretrained(plain)
    word_tokenizer(WORDS).save_pretrained(plain)
    modules = [Transformer(str(plain)), Pooling(16, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(path))
    return path


@pytest.fixture(scope="module")
def model(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def embed(model, text):
    """Return the mean of the last hidden states of one text, alone."""
    bert = model[0].auto_model.eval()
    with torch.no_grad():
        ids = torch.tensor([word_tokenizer(WORDS)(text)["input_ids"]])
        return bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0).double().numpy()


def cosine(model, first, second):
    a, b = embed(model, first), embed(model, second)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_best_cosine_with_the_references_by_hand(folder, model, batch_size):
    expected = [max(cosine(model, text, reference) for reference in REFERENCES) for text in TEXTS]
    got = scores(Similarity(folder, batch_size=batch_size), TEXTS, references=REFERENCES)
    assert got == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05
    assert scores(Similarity(model), TEXTS, references=REFERENCES) == pytest.approx(expected, abs=1e-5)
    assert scores(Similarity(folder), ["a bad film"], references=REFERENCES) == pytest.approx([1.0])


def test_a_fixed_text_and_the_whole_by_hand(folder, model):
    expected = [cosine(model, text, "bad plot") for text in TEXTS]
    assert scores(Similarity(folder, text="bad plot"), TEXTS) == pytest.approx(expected, abs=1e-5)
    expected = [cosine(model, f"p {text}", "bad plot") for text in TEXTS]
    assert scores(Similarity(folder, text="bad plot", reads="whole"), TEXTS) == pytest.approx(expected, abs=1e-5)


def test_an_empty_text_has_similarity_0(folder):
    got = scores(Similarity(folder), ["", "  ", "bad"], references=["bad", ""])
    assert got == [0.0, 0.0, pytest.approx(1.0)]
    reward = Similarity(folder, text="bad")
    assert scores(reward, [""]) == [0.0] == scores(Similarity(folder), [""], references=[""])


def test_a_text_is_embedded_once_a_call(folder, model, monkeypatch):
    seen, encode = [], type(model).encode
    monkeypatch.setattr(
        type(model), "encode", lambda self, texts, **k: (seen.append(list(texts)), encode(self, texts, **k))[1]
    )
    scores(Similarity(folder), ["bad", "film", "bad"], references=["film", "plot"])
    assert sorted(seen[0]) == ["bad", "film", "plot"] and len(seen) == 1


def test_it_is_loaded_when_asked_and_pickled_by_name(folder):
    reward = make_reward("similarity", model=str(folder), text="bad")
    assert reward._loaded is None and len(pickle.dumps(reward)) < 1000
    before = scores(reward, TEXTS)
    assert reward._loaded is not None and len(pickle.dumps(reward)) < 1000
    for twin in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
        assert twin._loaded is None and scores(twin, TEXTS) == before
    assert make_reward("similarity", model="no/such/folder", text="bad").score_at == "rollout_end"


def test_dtype_and_device(folder, model):
    exact = scores(Similarity(folder, text="bad"), TEXTS)
    half = Similarity(folder, text="bad", dtype="bfloat16", device="cpu")
    assert scores(half, TEXTS) == pytest.approx(exact, abs=0.05)
    assert {weight.dtype for weight in half._loaded.parameters()} == {torch.bfloat16}
    own = Similarity(copy.deepcopy(model).to(torch.bfloat16), text="bad")
    scores(own, TEXTS)
    assert {weight.dtype for weight in own._loaded.parameters()} == {torch.bfloat16}


def test_missing_references_and_wrong_options_are_refused(folder):
    with pytest.raises(ValueError, match="Expected a prompt with reference texts"):
        Similarity(folder).score(*rows(["bad"]))
    with pytest.raises(ValueError, match="`batch_size` to be at least 1, got 0"):
        Similarity(folder, batch_size=0)
    with pytest.raises(ValueError, match="`text` to have words, got ' '"):
        Similarity(folder, text=" ")
    with pytest.raises(ValueError, match="`score_at` to be one of"):
        Similarity(folder, score_at="step")
    with pytest.raises(ValueError, match="to be a dtype of torch"):
        scores(Similarity(folder, text="bad", dtype="float99"), ["a"])


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "rises"), [(1.0, True), (-1.0, False)])
def test_a_policy_learns_to_be_near_a_text_or_far_from_it(folder, sign, rises):
    """The cosine rises or falls with the sign of the reward."""
    reward, tokenizer = Similarity(folder, text="good plot good"), word_tokenizer(WORDS)
    env = TextEnv(["a film"], tokenizer, reward=Scale(reward, sign), max_new_tokens=3, stop_ids=())
    assert env.score_at == "rollout_end"
    model = tiny_agent(env, n_envs=32, lm=tiny_config(vocab_size=len(tokenizer)))
    options = {"reward": reward, "n": 100, "max_new_tokens": 3, "stop_ids": ()}
    before = evaluate(model, ["a film"], tokenizer, **options).figures["reward"].value
    model.learn(96 * 25)
    after = evaluate(model, ["a film"], tokenizer, **options).figures["reward"].value
    assert (after - before > 0.2) if rises else (after - before < -0.2), (before, after)
