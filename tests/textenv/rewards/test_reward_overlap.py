"""Rewards for overlap with references, and `Vader`: by hand, and compared with the libraries."""

import math
import pickle
import warnings

import pytest

from tests.helpers.rewards import scores
from textenv.episodes.scores import RewardError
from textenv.rewards import BLEU, METEOR, ROUGE, ChrF, SacreBLEU, Vader, make_reward
from textenv.rewards.wordnet import NoWordNet

TEXTS = ["the cat sat on the mat .", "a cat was sitting here", "", "on the mat the cat sat", "nothing at all"]
REFERENCES = ["the cat sat on a mat .", "the cats sat down on the mat"]
ALL = [METEOR(wordnet=False), ROUGE(), ROUGE("rouge2", "recall", stem=True), BLEU(), SacreBLEU(), ChrF(), ChrF(2)]


def test_meteor_by_hand():
    # 6 words of 7 match exactly in two chunks: P = R = 6/7, penalty 0.5 (2/6)^3; a synonym is no match.
    [score] = scores(METEOR(wordnet=False), ["the cat sat on one mat ."], references=REFERENCES[:1])
    assert score == pytest.approx((1 - 0.5 * (2 / 6) ** 3) * 6 / 7)


def test_rouge_by_hand():
    text, reference = ["a b d c"], ["a b c"]
    assert scores(ROUGE("rouge1"), text, references=reference) == [pytest.approx(2 * 3 / (4 + 3))]
    assert scores(ROUGE("rougeL", "precision"), text, references=reference) == [3 / 4]
    assert scores(ROUGE("rouge2", "recall"), text, references=reference) == [1 / 2]
    assert scores(ROUGE("rouge1", "recall"), text, references=["x", "a", "a b c"]) == [1.0]


def test_bleu_by_hand():
    # 3 of 3 words, 1 of 2 pairs, and shorter than the reference: exp(1 - 4/3)
    [score] = scores(BLEU(n=2), ["a b d"], references=["a b c d"])
    assert score == pytest.approx(math.sqrt(1 / 2) * math.exp(1 - 4 / 3))
    assert scores(BLEU(), [""], references=["a"]) == [0.0]


def test_same_as_the_libraries():
    import sacrebleu
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate import bleu_score, meteor_score
    from rouge_score.rouge_scorer import RougeScorer

    split = [wordpunct_tokenize(reference) for reference in REFERENCES]
    scorer, smooth = RougeScorer(["rougeL"]), bleu_score.SmoothingFunction().method1
    theirs = {
        "rouge": [scorer.score_multi(REFERENCES, text)["rougeL"].fmeasure for text in TEXTS],
        "sacrebleu": [sacrebleu.sentence_bleu(text, REFERENCES).score / 100 for text in TEXTS],
        "chrf": [sacrebleu.sentence_chrf(text, REFERENCES).score / 100 for text in TEXTS],
        "bleu": [
            bleu_score.sentence_bleu(split, text.split(), smoothing_function=smooth) if text else 0.0 for text in TEXTS
        ],
        "meteor": [meteor_score.meteor_score(split, wordpunct_tokenize(text), wordnet=NoWordNet()) for text in TEXTS],
    }
    for name, expected in theirs.items():
        reward = make_reward(name, **({"wordnet": False} if name == "meteor" else {}))
        assert scores(reward, TEXTS, references=REFERENCES) == pytest.approx(expected), name
        assert len(set(expected)) > 2, name


@pytest.mark.parametrize("reward", [*ALL, Vader()], ids=repr)
def test_they_pickle_and_stay_within_their_bounds(reward):
    values = scores(reward, TEXTS, references=REFERENCES)
    assert scores(pickle.loads(pickle.dumps(reward)), TEXTS, references=REFERENCES) == values
    assert all(-1.0 <= value <= 1.0 + 1e-9 for value in values)


@pytest.mark.parametrize("reward", ALL, ids=repr)
def test_a_prompt_without_references_is_named(reward):
    with pytest.raises(RewardError, match=r"references_column='references'.*prompt 'p '"):
        scores(reward, ["a"])


class Synonyms:
    """A stand-in for WordNet, in which "big" and "tall" are synonyms (nltk looks up stems, which they are)."""

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return [self] if word in ("big", "tall") else []

    def lemmas(self):
        return [type("Lemma", (), {"name": lambda self, word=word: word})() for word in ("big", "tall")]


def test_meteor_with_wordnet_and_without(monkeypatch):
    import nltk.corpus

    monkeypatch.setattr(nltk.corpus, "wordnet", Synonyms())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meteors = [METEOR(), METEOR(wordnet=True), METEOR(wordnet=False)]
    assert [meteor.name for meteor in meteors] == ["meteor", "meteor", "meteor_without_wordnet"]
    rewards = [scores(meteor, ["a big dog"], references=["a tall dog"])[0] for meteor in meteors]
    assert rewards[0] == rewards[1] == pytest.approx(1 - 0.5 / 27)
    assert rewards[2] == pytest.approx((1 - 0.5) * 2 / 3)


class Missing:
    """A stand-in for a WordNet that was not downloaded."""

    def ensure_loaded(self):
        raise LookupError("Resource wordnet not found.")


def test_meteor_says_that_wordnet_is_missing(monkeypatch):
    import nltk.corpus

    monkeypatch.setattr(nltk.corpus, "wordnet", Missing())
    with pytest.warns(UserWarning, match="without WordNet"):
        assert METEOR().name == "meteor_without_wordnet"
    with pytest.raises(LookupError, match=r"nltk.download\('wordnet'\)"):
        METEOR(wordnet=True)


def test_meteor_with_wordnet_refuses_to_score_where_it_is_missing(monkeypatch):
    import nltk.corpus

    monkeypatch.setattr(nltk.corpus, "wordnet", Synonyms())
    meteor = pickle.dumps(METEOR())
    monkeypatch.setattr(nltk.corpus, "wordnet", Missing())
    with pytest.raises(RewardError, match="Expected WordNet to be installed here, too"):
        scores(pickle.loads(meteor), ["a big dog"], references=["a tall dog"])


def test_vader_by_hand():
    # vaderSentiment normalises a sum of valences s to s / sqrt(s * s + 15); "good" has 1.9
    assert scores(Vader(), ["good", "", "bad"])[0] == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=5e-5)
    plain, negative = scores(Vader(reads="whole"), ["film", "film"], prompts=["a ", "a bad "])
    assert plain == 0.0 > negative
    assert scores(Vader("neg"), ["film"]) == [0.0]


@pytest.mark.parametrize(
    "build", [lambda: ROUGE("rouge"), lambda: ROUGE(measure="f1"), lambda: BLEU(0), lambda: Vader("all")]
)
def test_wrong_options(build):
    with pytest.raises(ValueError, match=r"Expected .*got"):
        build()
