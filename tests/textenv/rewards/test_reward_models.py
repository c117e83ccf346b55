"""Classifiers and reward models as rewards: the text they read, padding, truncation and normalised scores."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from agents import bpe_tokenizer, word_tokenizer
from tests.helpers.rewards import preds_of, rows, scores
from tests.helpers.training import tiny_agent, tiny_config
from textenv import CharTokenizer, Prompt, RewardError, TextEnv
from textenv.episodes.completion import Turn
from textenv.rewards import Cached, Ensemble, Scale, WeightedSum, make_reward
from textenv.rewards.classifier import Classifier
from textenv.rewards.preference import Preference
from textenv.rewards.reward_stats import STATS_FILE, RewardStats
from textenv.rewards.text_model import TextModel

WORDS = ["a", "good", "bad", "film", "plot", "user", "assistant", ":", "|"]
TEXTS = ["good", "a bad film", "a good film a good plot a good film", "", "plot plot"]
SHAPE = {"vocab_size": 16, "initializer_range": 0.5}
GPT = {**SHAPE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
LAYERS = {**SHAPE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA = {**LAYERS, "max_position_embeddings": 24, "eos_token_id": 0}
BERT = {**LAYERS, "max_position_embeddings": 24, "pad_token_id": 0}
FAMILIES = {
    "bert": (BertForSequenceClassification, BertConfig, BERT),
    "gpt2": (GPT2ForSequenceClassification, GPT2Config, GPT),
    "llama": (LlamaForSequenceClassification, LlamaConfig, LLAMA),
}
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} | {% endfor %}"


def tokenizer_of(side="right"):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.padding_side = side
    return tokenizer


def build(family="gpt2", n_labels=3, seed=0, **kwargs):
    model_class, config_class, shape = FAMILIES[family]
    torch.manual_seed(seed)
    names = {number: f"label{number}" for number in range(n_labels)}
    return model_class(config_class(**shape, id2label=names, **kwargs))


def by_hand(model, text):
    """Return the logits of one text, alone and unpadded; an empty text is a pad token."""
    ids = tokenizer_of()(text)["input_ids"] or [0]
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_b7_the_score_is_that_of_the_last_real_token(family, side, batch_size):
    model = build(family)
    logits = TextModel(model, tokenizer_of(side), batch_size=batch_size).logits(TEXTS)
    expected = np.stack([by_hand(model, text) for text in TEXTS])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 0.01  # the texts have different scores


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_b7_texts_that_end_with_the_pad_token_are_scored_at_it(family, batch_size):
    """The pad token is the end token, and closes some of the texts; read at 15, which no text has, is their last."""
    texts = ["good </s>", "a bad film", "a good film a good plot </s>", "</s>", "bad </s> </s>", ""]
    tokenizer, model = tokenizer_of(), build(family, pad_token_id=0)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer("</s>")["input_ids"][0] == 0
    logits = TextModel(model, tokenizer, batch_size=batch_size).logits(texts)
    assert model.config.pad_token_id == 0
    model.config.pad_token_id = 15
    np.testing.assert_allclose(logits, np.stack([by_hand(model, text) for text in texts]), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_b7_negative_control(family):
    """The negative control: with a wrong pad token, the score is read at the padding and differs."""
    model = build(family, pad_token_id=0).eval()
    ids = tokenizer_of()("a good film")["input_ids"]
    with torch.no_grad():
        padded = model(input_ids=torch.tensor([[*ids, 0, 0]])).logits[0]
        model.config.pad_token_id = 15
        other = model(input_ids=torch.tensor([[*ids, 0, 0]])).logits[0]
    np.testing.assert_allclose(padded, by_hand(model, "a good film"), atol=1e-5)
    assert (padded - other).abs().max() > 0.01


def test_classifier_by_hand():
    model, tokenizer = build(), tokenizer_of()
    logits = np.stack([by_hand(model, text) for text in TEXTS]).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for label in (1, "label1"):
        assert scores(Classifier(model, label, tokenizer=tokenizer), TEXTS) == pytest.approx(
            probabilities[:, 1], abs=1e-5
        )
    reward = Classifier(model, 2, output="logit", tokenizer=tokenizer)
    assert scores(reward, TEXTS) == pytest.approx(logits[:, 2], abs=1e-5)
    rewards = [scores(Classifier(model, label, output="label", tokenizer=tokenizer), TEXTS) for label in range(3)]
    assert np.array(rewards).T.tolist() == np.eye(3)[logits.argmax(1)].tolist()


def test_a_classifier_of_one_label_or_of_several_at_once_is_a_sigmoid():
    model = build(n_labels=1)
    expected = [1 / (1 + np.exp(-by_hand(model, text)[0])) for text in TEXTS]
    assert scores(Classifier(model, 0, tokenizer=tokenizer_of()), TEXTS) == pytest.approx(expected, abs=1e-5)
    model = build(problem_type="multi_label_classification")
    expected = [1 / (1 + np.exp(-by_hand(model, text)[1])) for text in TEXTS]
    assert scores(Classifier(model, 1, tokenizer=tokenizer_of()), TEXTS) == pytest.approx(expected, abs=1e-5)


def test_the_label_of_each_prompt():
    model = build()
    likeliest = [int(by_hand(model, text).argmax()) for text in TEXTS]
    reward = Classifier(model, label_column="intent", output="label", tokenizer=tokenizer_of())
    for name in ("label{}".format, int):
        for shift in (0, 1):
            prompts = [Prompt("a", row={"intent": name((label + shift) % 3)}) for label in likeliest]
            rewards = reward.score(prompts, [preds_of(text) for text in TEXTS], [True] * len(TEXTS))
            assert rewards == [1.0 - shift] * len(TEXTS)
    with pytest.raises(RewardError, match=r"Expected a label of .*'label0'.*got 'joy'"):
        env = TextEnv(["a"], CharTokenizer(), reward=reward)
        env._lanes.reward_calls.score([Prompt("a", row={"intent": "joy"})], [preds_of("good")], [True], False)


def test_c8_the_model_sees_text_and_never_the_policys_ids():
    """The policy's tokens are characters, and the model's are words: the score is that of the text."""
    model = build()
    reward = Classifier(model, 1, output="logit", reads="whole", tokenizer=tokenizer_of())
    prompts, preds, dones = rows(["good film"], prompts=["a "])
    assert max(preds[0].ids) > model.config.vocab_size
    assert reward.score(prompts, preds, dones) == pytest.approx([by_hand(model, "a good film")[1]], abs=1e-5)
    reward = Classifier(model, 1, output="logit", tokenizer=tokenizer_of())
    assert reward.score(prompts, preds, dones) == pytest.approx([by_hand(model, "good film")[1]], abs=1e-5)


@pytest.mark.parametrize(("side", "kept"), [("left", "good plot"), ("right", "a bad")])
def test_long_texts_are_cut_with_one_warning(side, kept, caplog):
    model = build()
    reward = Classifier(model, 1, output="logit", tokenizer=tokenizer_of(), max_length=2, truncation_side=side)
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than max_length=2 .* cut on the " + side):
        rewards = scores(reward, ["a bad film a good plot", "film"])
    assert rewards == pytest.approx([by_hand(model, text)[1] for text in (kept, "film")], abs=1e-5)
    scores(reward, ["a bad film"])  # a second warning would show in pytest's summary
    limited = tokenizer_of()
    limited.model_max_length = 24
    with pytest.warns(UserWarning, match="max_length=24"):
        scores(Classifier(model, 1, tokenizer=limited, truncation_side=side), ["film " * 25])
    assert not caplog.records  # transformers would log that such a text cannot be read


@pytest.mark.filterwarnings("error")
def test_texts_as_long_as_the_model_can_read():
    model = build()
    reward = Classifier(model, 1, tokenizer=tokenizer_of())
    assert reward._model.max_length == 24
    scores(reward, ["good " * 24])
    assert model.config.pad_token_id == 0 and reward._model.tokenizer is not reward.tokenizer
    with pytest.raises(ValueError, match=r"Expected `max_length` in \[1, 24\]"):
        Classifier(model, 1, tokenizer=tokenizer_of(), max_length=25)


def test_the_models_dtype():
    model = build()
    wide = scores(Classifier(model, 1, tokenizer=tokenizer_of()), TEXTS)
    reward = Classifier(build(), 1, tokenizer=tokenizer_of(), dtype="bfloat16")
    assert reward._model.model.dtype == torch.bfloat16
    narrow = scores(reward, TEXTS)
    assert narrow != wide and narrow == pytest.approx(wide, abs=0.05)
    with pytest.raises(ValueError, match="Expected `dtype`"):
        Classifier(model, 1, tokenizer=tokenizer_of(), dtype="half a byte")


def save(folder, n_labels=1, seed=0):
    build(n_labels=n_labels, seed=seed, pad_token_id=0).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return str(folder)


def test_a_saved_folder_scores_alike_and_pickles(tmp_path):
    reward = make_reward("classifier", model=save(tmp_path, 3), label="label1", device="cpu")
    expected = scores(Classifier(build(), 1, tokenizer=tokenizer_of()), TEXTS)
    assert scores(reward, TEXTS) == pytest.approx(expected, abs=1e-6)
    assert scores(pickle.loads(pickle.dumps(reward)), TEXTS) == scores(reward, TEXTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either `label` or `label_column`"),
        ({"label": 1, "label_column": "x"}, "either `label` or `label_column`"),
        ({"label": "joy"}, "Expected a label of"),
        ({"label": 3}, "a number below 3"),
        ({"label": 1, "output": "odds"}, "`output`"),
        ({"label": 1, "reads": "prompt"}, "`reads`"),
        ({"label": 1, "score_at": "step"}, "`score_at`"),
        ({"label": 1, "batch_size": 0}, "`batch_size`"),
        ({"label": 1, "tokenizer": None}, "own `tokenizer`"),
    ],
)
def test_wrong_options_of_a_classifier(options, words):
    with pytest.raises(ValueError, match=words):
        Classifier(build(), **{"tokenizer": tokenizer_of(), **options})


# Reward models.


def test_preference_reads_the_whole_text_and_normalises(tmp_path):
    folder = save(tmp_path)
    plain = Preference(folder)
    prompts, preds, dones = rows(TEXTS, prompts=["a film "] * len(TEXTS))
    raw = [float(by_hand(build(n_labels=1), "a film " + text)[0]) for text in TEXTS]
    assert plain.score(prompts, preds, dones) == pytest.approx(raw, abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"reward_stats.json.*RewardStats\(mean, std\)"):
        Preference(folder, stats="stored")
    stats = RewardStats.of(raw)
    stats.save(folder)
    assert json.loads((tmp_path / STATS_FILE).read_text()) == {"mean": np.mean(raw), "std": np.std(raw)}
    normal = Preference(folder, stats="stored").score(prompts, preds, dones)
    assert np.mean(normal) == pytest.approx(0.0, abs=1e-5) and np.std(normal) == pytest.approx(1.0, abs=1e-5)
    assert Preference(folder, stats=stats).score(prompts, preds, dones) == normal


def test_preference_in_a_chat():
    model, tokenizer = build(n_labels=1), tokenizer_of()
    tokenizer.chat_template = TEMPLATE
    reward = Preference(model, tokenizer=tokenizer, chat=True)
    assert reward.text(Prompt("a film"), preds_of("good")) == "user : a film | assistant : good | "
    expected = by_hand(model, "user : a film | assistant : good |")
    assert scores(reward, ["good"], prompts=["a film"]) == pytest.approx(expected, abs=1e-5)
    turns = preds_of("plot", closed=[Turn("good", "bad")])
    assert reward.text(Prompt("a"), turns) == "user : a | assistant : good | user : bad | assistant : plot | "
    reward = Preference(model, tokenizer=tokenizer, chat=True, messages_column="messages")
    messages = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "bad"}]
    prompt = Prompt("x", row={"messages": messages})
    assert reward.text(prompt, preds_of("film")) == "assistant : a | user : bad | assistant : film | "
    assert len(messages) == 2


def test_an_ensemble_of_reward_models():
    first, second = (Preference(build(n_labels=1, seed=seed), tokenizer=tokenizer_of()) for seed in (1, 2))
    both = np.array([scores(first, TEXTS), scores(second, TEXTS)])
    assert scores(Ensemble([first, second]), TEXTS) == pytest.approx(both.mean(0))
    strict = Ensemble([first, second], by="minimum")
    assert scores(strict, TEXTS) == pytest.approx(both.min(0)) and strict.score_at == "rollout_end"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_labels": 2}, "num_labels=1"),
        ({"chat": True}, "chat template"),
        ({"messages_column": "m"}, "chat=True"),
        ({"stats": "stored"}, "for a model in this process"),
        ({"stats": "beside"}, "`stats`"),
        ({"reads": "prompt"}, "`reads`"),
    ],
)
def test_wrong_options_of_a_preference(options, words):
    n_labels = options.pop("n_labels", 1)
    with pytest.raises(ValueError, match=words):
        Preference(build(n_labels=n_labels), tokenizer=tokenizer_of(), **options)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (float("nan"), 1.0), (0.0, -1.0)])
def test_wrong_stats(mean, std):
    with pytest.raises(ValueError, match="positive std"):
        RewardStats(mean, std)


def test_a_tokenizer_without_pad_and_end_is_named():
    tokenizer = bpe_tokenizer(["a"], 260)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Expected a tokenizer with a pad or an end token"):
        TextModel(build(), tokenizer)


# In training.


class Calls(Classifier):
    """A classifier that counts the texts of each call."""

    def score(self, prompts, preds, dones):
        self.sizes = [*vars(self).get("sizes", []), len(prompts)]
        return super().score(prompts, preds, dones)


def test_a_rollouts_texts_are_scored_in_one_call():
    judge = Calls(build(), 1, tokenizer=tokenizer_of())
    before = [weight.clone() for weight in judge.model.parameters()]
    env = TextEnv(["a", "b"], CharTokenizer(), reward=WeightedSum({"judge": Cached(judge)}), max_new_tokens=4)
    assert env.score_at == "rollout_end"
    model = tiny_agent(env, n_envs=4, n_steps=16)
    model.learn(64)
    assert len(judge.sizes) == 1 and judge.sizes[0] > 4
    assert all(torch.equal(old, new) for old, new in zip(before, judge.model.parameters()))
    assert all(weight.grad is None for weight in judge.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "learns"), [(1.0, True), (0.0, False)])
def test_a_policy_learns_what_a_classifier_likes(factor, learns):
    """The classifier prefers "b"; with rewards scaled to 0, nothing is learned."""
    letters = bpe_tokenizer(["ab"], 257)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=8, n_layer=0, n_head=1, num_labels=2, eos_token_id=0)
    model = GPT2ForSequenceClassification(config)
    with torch.no_grad():  # without layers, the score depends on the last letter alone
        for weight in (model.transformer.wpe.weight, model.transformer.wte.weight, model.score.weight):
            weight.zero_()
        model.transformer.wte.weight[letters("b")["input_ids"][0], 0] = 1.0
        model.score.weight[1, 0] = 3.0
    judge = Classifier(model, 1, tokenizer=letters)
    assert scores(judge, ["b"])[0] > 0.9 and scores(judge, ["a"]) == [0.5]
    env = TextEnv(["a", "c"], CharTokenizer("abc"), reward=Scale(judge, factor), max_new_tokens=1)
    agent = tiny_agent(env, lm=tiny_config(4), n_envs=32, n_steps=2)
    agent.learn(64 * 20)
    share = np.mean([agent.predict(env.reset(seed=seed)[0], deterministic=False)[0] == 2 for seed in range(100)])
    assert share > 0.9 if learns else share < 0.6
