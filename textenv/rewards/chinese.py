"""The sentiment of Chinese texts by the classifier that the package SnowNLP brings."""

from __future__ import annotations

from dataclasses import dataclass

from textenv.checks.extras import needs
from textenv.episodes.completion import Preds
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import Reads, RowReward, check_choice, read_text


@dataclass
class SnowNLP(RowReward):
    """The probability that a Chinese text is positive, by naive Bayes over its words, in [0, 1].

    The model is the one inside the package snownlp (MIT), which others trained on 17,411 reviews, mostly of purchases:
    nothing is downloaded, and no pickle is read. The probability of class c of a text of words w is proportional to
    P(c) times the product of all P(w | c) (https://github.com/isnowfy/snownlp, `classification/bayes.py`); the sum of
    logarithms is not divided by the length, so that long texts get values near 0 or 1. Stop words count for nothing.
    The word segmentation takes some milliseconds for each sentence, and the package some seconds and 400 MB when it is
    loaded. The reward needs snownlp: `pip install "textenv[chinese]"`.

    Args:
        reads: "completion" scores the completion alone, "whole" the prompt and the completion as one text.

    Raises:
        ImportError: If snownlp is not installed.

    Example:
        >>> from textenv.rewards import SnowNLP
        >>> SnowNLP(reads="whole").score_text("质量很好，满意")  # doctest: +SKIP
        0.8721071022091175
    """

    reads: Reads = "completion"

    def __post_init__(self) -> None:
        check_choice("reads", self.reads, ("completion", "whole"))
        with needs("chinese", "snownlp", "SnowNLP"):
            from snownlp import sentiment
        self._classify = sentiment.classify

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score of a row."""
        return self.score_text(read_text(self.reads, prompt, preds))

    def score_text(self, text: str) -> float:
        """Return the score of a text by itself; one without words has the share of positive reviews' words."""
        return float(self._classify(text))
