"""The reward `SnowNLP`: by hand from the counts inside the package, and on rankings that it has not seen.

The tests are slow, since the package takes some seconds to load.
"""

import math

import pytest

from textenv import CharTokenizer, Preds, Prompt
from textenv.rewards import SnowNLP, make_reward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sentiment():
    return pytest.importorskip("snownlp").sentiment


def by_hand(sentiment, words):
    """Return P(positive) by naive Bayes, with one added to each count; a word that a class lacks counts as 1."""
    counts = sentiment.classifier.classifier.d
    logs = {
        mood: math.log(of.total) + sum(math.log(of.d.get(word, 1) / of.total) for word in words)
        for mood, of in counts.items()
    }
    return 1 / (1 + math.exp(logs["neg"] - logs["pos"]))


def test_the_score_by_hand(sentiment):
    reward = SnowNLP()
    assert reward.score_text("质量") == pytest.approx(by_hand(sentiment, ["质量"]))
    assert reward.score_text("质量满意") == pytest.approx(by_hand(sentiment, ["质量", "满意"]))
    # The stop word "的" counts for nothing, and neither does punctuation.
    assert reward.score_text("质量的满意。") == pytest.approx(by_hand(sentiment, ["质量", "满意"]))
    assert reward.score_text("") == pytest.approx(by_hand(sentiment, []))


def test_what_is_read(sentiment):
    completion, whole = SnowNLP(), make_reward("snownlp", reads="whole")
    tokenizer = CharTokenizer("太差了")
    row = Prompt("质量很好，"), Preds(tokenizer, tokenizer.encode("太差了"))
    alone, both = completion(*row, True), whole(*row, True)
    assert completion(*row, False) == 0.0
    assert alone == completion.score_text("太差了") < both == completion.score_text("质量很好，太差了")
    with pytest.raises(ValueError, match=r"Expected `reads` to be one of \['completion', 'whole'\], got 'all'"):
        SnowNLP(reads="all")


def test_better_reviews_score_higher(sentiment):
    """The useful case, and its control: characters in reverse order have no words."""
    reward = SnowNLP()
    better = ["质量很好，非常满意", "房间干净，服务热情", "物流很快，值得购买", "苹果很甜，孩子喜欢"]
    worse = ["质量太差，非常失望", "房间很脏，服务恶劣", "物流太慢，不值得买", "苹果烂了，要求退货"]
    gaps = [reward.score_text(good) - reward.score_text(bad) for good, bad in zip(better, worse)]
    assert min(gaps) > 0.3
    reversed_gaps = [reward.score_text(good[::-1]) - reward.score_text(bad[::-1]) for good, bad in zip(better, worse)]
    assert sum(reversed_gaps) < 0.5 * sum(gaps)
