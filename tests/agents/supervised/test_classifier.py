"""`train_classifier`: learning from labels and not from shuffled ones, saved folders, and their use as a reward."""

import random

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from agents import train_classifier, word_tokenizer
from agents.supervised.accuracy import wilson_interval
from agents.supervised.classifier import _collate
from tests.helpers.models import few
from tests.helpers.rewards import scores
from textenv.rewards.classifier import Classifier

WORDS = ["good", "bad", "film", "plot", "the", "a", "was", "is"]
TOKENIZER = word_tokenizer(WORDS)
NAMES = ["negative", "positive"]
SIZE = {"vocab_size": len(TOKENIZER), "pad_token_id": 0}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": BertConfig(**SIZE, **LAYERS, max_position_embeddings=24),
    "distilbert": DistilBertConfig(**SIZE, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=24),
    "gpt2": GPT2Config(**SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=0),
}


def some_texts(n, seed=0):
    """Return different texts of 3 to 8 words that contain "good" or "bad", and their labels, 1 for "good"."""
    rng = np.random.default_rng(seed)
    texts = {}
    while len(texts) < n:
        words = rng.choice(WORDS[2:], rng.integers(3, 9))
        label = int(rng.integers(2))
        words[rng.integers(len(words))] = WORDS[1 - label]
        texts[" ".join(words)] = label
    return list(texts), list(texts.values())


TEXTS, LABELS = some_texts(500)
TRAIN, TEST = (TEXTS[:300], LABELS[:300]), (TEXTS[300:], LABELS[300:])


def trained(folder, family="bert", labels=TRAIN[1], texts=TRAIN[0], **kwargs):
    settings = {"n_epochs": 5, "learning_rate": 1e-2, "label_names": NAMES, "progress_bar": False, **kwargs}
    lm = CONFIGS[family] if isinstance(family, str) and family in CONFIGS else family
    return train_classifier(lm, TOKENIZER, texts, labels, folder, **settings)


def weights_of(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", few(CONFIGS, 1))
def test_it_learns_and_its_folder_is_a_reward(family, tmp_path):
    result = trained(tmp_path / "m", family, held_out=TEST)
    assert result.n_steps == 50 and result.held_out.accuracy > 0.95 and result.held_out.n_texts == 200
    assert result.held_out[2:4] == wilson_interval(result.held_out.accuracy, 200)
    reward = Classifier(tmp_path / "m", label="positive")
    good, bad, empty = scores(reward, ["the film was good", "the film was bad", ""])
    assert good > 0.9 and bad < 0.1 and 0 < empty < 1
    # The measured accuracy is that of the reward, which loads the folder.
    labels = [int(score > 0.5) for score in scores(reward, TEST[0])]
    assert np.mean(np.array(labels) == TEST[1]) == result.held_out.accuracy
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_from_shuffled_labels_nothing_is_learned(tmp_path):
    labels = np.random.default_rng(0).permutation(TRAIN[1]).tolist()
    figures = trained(tmp_path / "m", labels=labels, held_out=TEST).held_out
    assert figures.low < 0.5 < figures.high + 0.08 and figures.accuracy < 0.65


def test_the_loss_is_the_models_own(tmp_path):
    result = trained(tmp_path / "m", n_epochs=1, held_out=TEST)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        losses = [
            float(model(**TOKENIZER(text, return_tensors="pt"), labels=torch.tensor([label])).loss)
            for text, label in zip(*TEST)
        ]
    assert result.held_out.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id["positive"] == 1


@pytest.mark.slow
def test_a_language_model_gets_a_head_and_a_classifier_is_trained_further(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(CONFIGS["gpt2"]).save_pretrained(tmp_path / "lm")
    first = trained(tmp_path / "a", str(tmp_path / "lm"), n_epochs=1, held_out=TEST)
    second = trained(tmp_path / "b", str(tmp_path / "a"), n_epochs=4, held_out=TEST)
    assert second.held_out.loss < first.held_out.loss


def test_texts_that_end_with_the_pad_token_are_trained_at_it(tmp_path, monkeypatch):
    """The pad token, 0, is the end token, and closes all texts: the batches are padded with another one."""
    batches = []

    def collate(rows, pad_id):
        batches.append((pad_id, _collate(rows, pad_id)))
        return batches[-1][1]

    monkeypatch.setattr("agents.supervised.classifier._collate", collate)
    texts = [f"{text} </s>" for text in TRAIN[0][:8]]
    folder = trained(tmp_path / "m", "gpt2", TRAIN[1][:8], texts, n_epochs=1, batch_size=8).folder
    [(pad_id, batch)] = batches
    assert pad_id == 1 and AutoModelForSequenceClassification.from_pretrained(folder).config.pad_token_id == 0
    lengths = batch["attention_mask"].sum(1).tolist()
    assert [row[n - 1].item() for row, n in zip(batch["input_ids"], lengths)] == [0] * 8
    assert all(row[n:].eq(pad_id).all() for row, n in zip(batch["input_ids"], lengths)) and len(set(lengths)) > 1


@pytest.mark.slow
def test_several_labels_and_longer_texts_that_are_cut_here_and_in_the_reward(tmp_path):
    texts, labels = ["the good", "the bad", "the plot"] * 20, [0, 1, 2] * 20
    with pytest.warns(UserWarning, match="are longer than max_length=2"):
        long = [text + " good bad plot" for text in texts]
        result = trained(tmp_path / "m", "gpt2", labels, long, label_names=None, max_tokens=2, n_epochs=15)
    assert result.training.accuracy == 1.0 and result.held_out is None
    reward = Classifier(tmp_path / "m", label="LABEL_2", output="label")
    with pytest.warns(UserWarning, match="are longer than max_length=2"):
        assert scores(reward, long[:3]) == [0, 0, 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "m").model_max_length == 2
    assert TOKENIZER.model_max_length > 1e9  # the caller's own tokenizer is unchanged


@pytest.mark.slow
def test_equal_seeds_train_the_same_and_global_generators_are_left_alone(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before, config = states(), CONFIGS["bert"].to_dict()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained(tmp_path / name, seed=seed, n_epochs=0.5)
    assert states() == before and CONFIGS["bert"].to_dict() == config
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"texts": [], "labels": []}, "at least one text, got 0 texts and 0 labels"),
        ({"labels": [1]}, "got 300 texts and 1 labels"),
        ({"labels": [2] * 300}, "row 0 of `labels` to be a number below 2.*got 2"),
        ({"labels": ["positive"] * 300}, "row 0 of `labels`.*got 'positive'"),
        ({"held_out": (["good"], [-1])}, "row 0 of `held_out`.*got -1"),
        ({"labels": [0] * 300, "label_names": None}, r"at least two labels of different names, got \['LABEL_0'\]"),
        ({"label_names": ["good", "good"]}, "different names"),
        ({"max_tokens": 25}, r"in \[1, 24\], what tokenizer and model allow, got 25"),
        ({"family": BertConfig(**{**SIZE, **LAYERS, "vocab_size": 4})}, "the 10 tokens of the tokenizer, got 4"),
    ],
)
def test_what_cannot_be_trained_is_refused(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "m", **kwargs)
    assert not list(tmp_path.iterdir())
