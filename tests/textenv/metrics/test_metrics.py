"""Metrics against values worked by hand and against the reference libraries."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from transformers import GPT2ForSequenceClassification

from agents import evaluate, word_tokenizer
from tests.helpers.models import N_TOKENS, make_policy, tiny
from tests.helpers.rewards import scores
from textenv import CharTokenizer, Prompt, metrics, rewards
from textenv.metrics import (
    BLEU,
    METEOR,
    ROUGE,
    ChrF,
    IntentAccuracy,
    Perplexity,
    SacreBLEU,
    mean_of,
)
from textenv.metrics.bootstrap import difference, estimate, figures_of, per_prompt
from textenv.metrics.scores import Scores
from textenv.rewards import overlap_measures

TEXTS = ["the cat sat on the mat .", "a dog", "", "there is a green house", "it rains in spring and autumn"]
REFERENCES = [
    ["the cat sat on a mat .", "a cat was sitting there"],
    ["the dog"],
    ["nothing was said"],
    ["there was a green house here", "houses are green", "a house"],
    ["it rains in autumn and spring"],
]
PROMPTS = [""] * len(TEXTS)


def streams(references):
    """Return references in sacrebleu's layout: one list per index, with None for rows that have fewer."""
    width = max(map(len, references))
    return [[own[i] if i < len(own) else None for own in references] for i in range(width)]


# Overlap


def test_rouge_by_hand():
    """4 of 4 words against 5: P = 1, R = 4/5. Bigrams: 2 of 3 against 4. Longest common subsequence: 4."""
    kinds = [ROUGE(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")]
    rows = [""], ["police killed the gunman"], [["police ended killed the gunman"]]
    scores = {name: figure for rouge in kinds for name, figure in rouge(*rows).items()}
    assert scores["rouge1"].value == pytest.approx(2 * 1 * 0.8 / 1.8)
    assert scores["rouge2"].value == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rougeL"].value == scores["rougeLsum"].value == pytest.approx(8 / 9)
    whole, lines = [rouge([""], ["b c\na"], [["a\nb c"]]) for rouge in kinds[2:]]
    # The sentences are in another order, and only Lsum compares them one by one.
    assert whole["rougeL"].value == pytest.approx(2 / 3) and lines["rougeLsum"].value == 1.0
    assert list(ROUGE("rouge1", "recall")([""], ["a"], [["a"]])) == ["rouge1_recall"]


def test_rouge_is_the_best_reference_and_the_mean_over_rows():
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    for name in kinds:
        scores = ROUGE(name, stem=True)(PROMPTS, TEXTS, REFERENCES)[name]
        best = [max(scorer.score(other, text)[name].fmeasure for other in own) for text, own in zip(TEXTS, REFERENCES)]
        assert scores.per_row.tolist() == pytest.approx(best)
        assert scores.value == pytest.approx(np.mean(best))


def test_rouge_of_characters():
    chinese = [""], ["很好看"], [["不好看"]]
    assert ROUGE("rouge1")(*chinese)["rouge1"].value == 0.0
    assert ROUGE("rouge1", split=list)(*chinese)["rouge1"].value == pytest.approx(2 / 3)


def without_wordnet(monkeypatch):
    monkeypatch.setattr(overlap_measures, "installed_wordnet", lambda: None)
    return METEOR()


def test_meteor_by_hand(monkeypatch):
    """Two of three words, in one chunk: P = 2/3, R = 2/4, F = PR / (0.9 P + 0.1 R), penalty 0.5 (1/2)^3."""
    meteor = without_wordnet(monkeypatch)
    scores = meteor(["", ""], ["The cats ran", ""], [["a", "the cat was there"], ["x"]])
    f = (2 / 3) * (2 / 4) / (0.9 * 2 / 3 + 0.1 * 2 / 4)
    assert list(scores) == ["meteor_without_wordnet"]
    assert scores["meteor_without_wordnet"].per_row.tolist() == pytest.approx([(1 - 0.5 / 8) * f, 0.0])


def test_meteor_with_wordnet_counts_synonyms_and_is_called_meteor(monkeypatch):
    """The words are their own stems, as nltk looks up synonyms of stems."""

    class Lemma:
        def __init__(self, word):
            self.word = word

        def name(self):
            return self.word

    class Synset:
        def lemmas(self):
            return [Lemma("car"), Lemma("auto")]

    class WordNet:
        def synsets(self, word):
            return [Synset()] if word in ("car", "auto") else []

    rows = [""], ["a car"], [["a auto"]]
    without = without_wordnet(monkeypatch)(*rows)["meteor_without_wordnet"].value
    monkeypatch.setattr(overlap_measures, "installed_wordnet", WordNet)
    assert without < METEOR()(*rows)["meteor"].value == pytest.approx(1 - 0.5 / 8)


def test_missing_wordnet_data_is_detected(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    from nltk.corpus import wordnet

    if type(wordnet).__name__ == "LazyCorpusLoader":  # else another test has loaded it
        assert overlap_measures.installed_wordnet() is None


@pytest.mark.parametrize("references", [REFERENCES, [own[:1] for own in REFERENCES]])
def test_sacrebleu_and_chrf_are_those_of_the_corpus(references):
    from sacrebleu.metrics import BLEU as Theirs
    from sacrebleu.metrics import CHRF

    theirs = Theirs().corpus_score(TEXTS, streams(references)).score / 100
    assert SacreBLEU()(PROMPTS, TEXTS, references)["sacrebleu"].value == pytest.approx(theirs) and theirs > 0.1
    for order, name in ((0, "chrf"), (2, "chrf++")):
        theirs = CHRF(word_order=order).corpus_score(TEXTS, streams(references)).score / 100
        assert ChrF(order)(PROMPTS, TEXTS, references)[name].value == pytest.approx(theirs)


SAME = {
    "METEOR": {"wordnet": False},
    "ROUGE": {"kind": "rouge2", "measure": "recall", "stem": True},
    "BLEU": {"n": 2},
    "SacreBLEU": {"lowercase": True},
    "ChrF": {"word_order": 2},
}


@pytest.mark.parametrize("name", SAME)
def test_a_metric_and_the_reward_of_its_name_agree(name):
    """Options, figures per row and units are equal. The total is their mean, or computed from summed counts."""
    reward, metric = vars(rewards)[name](**SAME[name]), vars(metrics)[name](**SAME[name])
    earned = [scores(reward, [text], references=own)[0] for text, own in zip(TEXTS, REFERENCES)]
    figure = metric(PROMPTS, TEXTS, REFERENCES)[reward.name]
    assert figure.per_row == pytest.approx(earned) and 0 < max(earned) <= 1 and len(set(earned)) > 2
    is_mean = math.isclose(figure.value, np.mean(earned))
    assert is_mean == (name not in ("SacreBLEU", "ChrF"))


def test_a_reward_and_a_metric_by_hand():
    """2 and 1 of 2 unigrams match, 1 and 0 of 1 bigram; the 0 counts as 0.1 in nltk, as 1/2 in sacrebleu."""
    texts, references = ["a b", "a x"], [["a b"], ["a b"]]
    for reward, metric, second in [
        (rewards.ROUGE("rouge1"), metrics.ROUGE("rouge1"), 1 / 2),
        (rewards.BLEU(n=2), metrics.BLEU(n=2), math.sqrt(1 / 2 * 0.1)),
    ]:
        assert scores(reward, texts, references=["a b"]) == pytest.approx([1.0, second])
        assert metric(["", ""], texts, references)[metric.name].value == pytest.approx((1.0 + second) / 2)
    both = rewards.SacreBLEU(), metrics.SacreBLEU()
    assert scores(both[0], texts, references=["a b"]) == pytest.approx([1.0, math.sqrt(1 / 2 * 1 / 2)])
    corpus = both[1](["", ""], texts, references)["sacrebleu"]
    assert corpus.value == pytest.approx(math.sqrt(3 / 4 * 1 / 2))  # 3 of 4 and 1 of 2 match, which is no mean of rows


@pytest.mark.parametrize("metric", [SacreBLEU(), ChrF()], ids=["bleu", "chrf"])
def test_a_resampled_corpus_score_is_that_of_the_resampled_corpus(metric):
    """Summing the counts of resampled rows gives the score of the resampled corpus."""
    (scores,) = metric(PROMPTS, TEXTS, REFERENCES).values()
    n = len(TEXTS)
    resamples = np.random.default_rng(3).integers(n, size=(4, n))
    without_one = np.array([[i for i in range(n) if i != left_out] for left_out in range(n)])
    for drawn in (resamples, without_one):
        figures = []
        for rows in drawn:
            (figure,) = metric([""] * len(rows), [TEXTS[i] for i in rows], [REFERENCES[i] for i in rows]).values()
            figures.append(figure.value)
        assert figures_of(scores, drawn) == pytest.approx(figures) and len(set(figures)) > 2


def test_sacrebleu_by_hand():
    """Precisions 5/6, 3/5, 1/4 and none of 3, smoothed to 1/2 of 1/3; equally long."""
    score = SacreBLEU()([""], ["the cat sat on the mat"], [["the cat was on the mat"]])["sacrebleu"].value
    assert score == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


@pytest.mark.parametrize("metric", [ROUGE(), METEOR(), BLEU(), SacreBLEU(), ChrF()])
def test_a_text_without_references_is_named(metric):
    with pytest.raises(ValueError, match=r"references for each text, got \[\] for row 1: name the column"):
        metric(["", ""], ["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="got 'ab' for row 0"):
        metric([""], ["a"], ["ab"])
    with pytest.raises(ValueError, match="for each of 2 texts, got 1"):
        metric(["", ""], ["a", "b"], [["a"]])


def test_unknown_kinds_and_splits_are_refused():
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of \['rouge1', .* got 'rougeX'"):
        ROUGE("rougeX")
    with pytest.raises(ValueError, match="Expected either `stem` or `split`, got both"):
        ROUGE(stem=True, split=list)
    for measure in (ROUGE, METEOR):
        with pytest.raises(ValueError, match="Expected `split` to be a function from a text to its words, got 'list'"):
            measure(split="list")


# Perplexity


@pytest.fixture(scope="module")
def judge():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny(n_positions=24)).train()


def by_hand(model, prompt, text):
    """Return the negative log-likelihood and the number of tokens, with one forward per token."""
    ids = CharTokenizer().encode(prompt + text)
    model.eval()
    nats = [
        -torch.log_softmax(model(torch.tensor([ids[:i]])).logits[0, -1].double(), -1)[ids[i]].item()
        for i in range(max(len(prompt), 1), len(ids))
    ]
    model.train()
    return sum(nats), len(nats)


ROWS = [("ab", "cde"), ("a", ""), ("hello ", "there"), ("", "xyz"), ("ijk", "l")]


@pytest.mark.parametrize("batch_tokens", [8192, 12, 1])
def test_perplexity_is_that_of_one_token_at_a_time(judge, batch_tokens):
    prompts, texts = zip(*ROWS)
    scores = Perplexity(judge, CharTokenizer(), batch_tokens=batch_tokens)(prompts, texts, [[]] * 5)["perplexity"]
    expected = np.array([by_hand(judge, *row) for row in ROWS])
    assert np.allclose(scores.rows, expected, atol=1e-5)
    assert scores.value == pytest.approx(math.exp(expected[:, 0].sum() / expected[:, 1].sum()), rel=1e-5)
    assert judge.training


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny(vocab_size=N_TOKENS))
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    scores = Perplexity(model, CharTokenizer(), name="uniform")(["ab"], ["cd"], [[]])["uniform"]
    assert scores.value == pytest.approx(N_TOKENS)
    empty = Perplexity(model, CharTokenizer())(["ab"], [""], [[]])["perplexity"]
    assert math.isnan(empty.value) and estimate(empty)[1:] == (None, None)


def test_a_long_prompt_loses_its_start_and_a_long_text_is_refused(judge):
    metric = Perplexity(judge, CharTokenizer())
    long = metric(["z" * 9 + "abcdefghijklmnopqr"], ["stuvwx"], [[]])["perplexity"]
    assert np.allclose(long.rows, [by_hand(judge, "abcdefghijklmnopqr", "stuvwx")], atol=1e-5)
    with pytest.raises(ValueError, match="fit max_tokens=24 with a token before, got 24 tokens in row 0"):
        metric(["a"], ["b" * 24], [[]])


# Intervals


def test_an_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    result = estimate(mean_of(values))
    error = values.std() / 20
    assert result.value == pytest.approx(values.mean())
    assert result.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert result.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert estimate(mean_of(values)) == result != estimate(mean_of(values), seed=1)


def test_an_interval_is_scipys():
    from scipy.stats import bootstrap

    values = np.random.default_rng(4).lognormal(size=30)
    squared = mean_of(values)._replace(figure=lambda sums: (sums[0] / sums[1]) ** 2)
    for statistic, figure in [(np.mean, mean_of(values)), (lambda x, axis: x.mean(axis) ** 2, squared)]:
        options = {"n_resamples": 400, "rng": np.random.default_rng(5), "batch": 100}
        theirs = bootstrap((values,), statistic, **options).confidence_interval
        interval = estimate(figure, seed=5, n_resamples=400)
        assert (interval.low, interval.high) == pytest.approx(tuple(theirs))
    # The values are skewed to the right, so that the interval reaches further up than down.
    assert interval.high - interval.value > 1.3 * (interval.value - interval.low)


def test_rows_without_a_spread():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate(mean_of([0.1] * 10)) == pytest.approx((0.1, 0.1, 0.1))
        assert estimate(mean_of([0.0] * 3)) == (0.0, 0.0, 0.0)
        assert estimate(mean_of([3.0])) == (3.0, None, None)  # a single row tells nothing about the spread
        assert estimate(mean_of([0.0, 1.0])) == (0.5, 0.0, 1.0)
        assert difference(mean_of([1.0, 2.1, 3.3]), mean_of([0.0, 1.1, 2.3])) == pytest.approx((1.0, 1.0, 1.0))
        some_are_empty = Scores(np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))  # 8 of 27 draws have no figure
        assert estimate(some_are_empty) == (0.5, None, None)


def test_a_paired_difference_has_a_narrower_interval_than_two_figures():
    generator = np.random.default_rng(2)
    before = generator.normal(0.0, 5.0, size=200)
    after = before + generator.normal(0.3, 0.5, size=200)
    paired, alone = difference(mean_of(after), mean_of(before)), estimate(mean_of(after - before))
    assert paired == pytest.approx(alone)
    assert paired.low > 0 and estimate(mean_of(after)).low < estimate(mean_of(before)).high
    with pytest.raises(ValueError, match="same prompts twice, got 200 and 3 rows"):
        difference(mean_of(after), mean_of(before[:3]))


def test_texts_of_one_prompt_are_drawn_together():
    """The texts of a prompt differ, and the prompts' means do not: there is no spread over prompts."""
    scores = per_prompt(mean_of([0.0, 1.0, 0.0, 1.0]), 2)
    assert scores.per_row.tolist() == [0.5, 0.5]
    assert estimate(scores) == (0.5, 0.5, 0.5)


def test_metrics_are_imported_without_torch_and_the_libraries():
    libraries = {"torch", "transformers", "nltk", "sacrebleu", "scipy"}
    code = f"import sys, textenv.metrics, textenv.metrics.bootstrap; print(*{libraries} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# Intent


def test_intent_accuracy_by_hand():
    """Three of four texts get their rows' intent, as one forward per text shows; batches change nothing."""
    torch.manual_seed(0)
    config = tiny(num_labels=4, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    words = word_tokenizer(["good", "film", "who", "?"])
    texts = ["good film", "who ?", "", "good good good ? film"]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([words.encode(text) or [0]])).logits[0] for text in texts]
    read = [int(row.argmax()) for row in logits]
    labels = [*read[:3], (read[3] + 1) % 4]
    prompts = [Prompt("a", row={"intent": label, "act": f"LABEL_{label}"}) for label in labels]
    for options in ({}, {"batch_size": 1}, {"label_column": "act"}):
        scores = IntentAccuracy(model, words, **options)(prompts, texts, [[]] * 4)["intent_accuracy"]
        assert scores.per_row.tolist() == [1.0, 1.0, 1.0, 0.0] and scores.value == 0.75
    assert list(IntentAccuracy(model, words, name="judge")(prompts, texts, [[]] * 4)) == ["judge"]


def test_intent_accuracy_needs_the_rows():
    model = GPT2ForSequenceClassification(tiny(num_labels=4, pad_token_id=0))
    metric = IntentAccuracy(model, word_tokenizer(["a"]))
    for prompt in ("a", Prompt("a")):
        with pytest.raises(ValueError, match=r"Expected prompts whose rows have the column 'intent', .*got 'a'"):
            metric([prompt], ["a"], [[]])


def test_evaluate_gives_metrics_the_rows():
    seen = []

    def look(prompts, texts, references):
        seen.extend(prompt.row["intent"] for prompt in prompts)
        return {}

    rows = [{"prompt": "a", "intent": 2}, {"prompt": "b", "intent": 0}]
    evaluate(make_policy(), rows, CharTokenizer(), [look], max_new_tokens=2)
    assert seen == [2, 0]
