"""The sentiment of English texts by a lexicon, VADER."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textenv.checks.extras import needs
from textenv.episodes.completion import Preds
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import Reads, RowReward, check_choice, read_text


@dataclass
class Vader(RowReward):
    """The sentiment of an English text by VADER's lexicon and rules (Hutto and Gilbert, 2014).

    The reward needs vaderSentiment: `pip install "textenv[sentiment]"`.

    Args:
        part: "compound", in [-1, 1], or the share of the text that is "pos", "neg" or "neu", in [0, 1].
        reads: "completion" scores the completion alone, "whole" the prompt and the completion as one text.

    Raises:
        ImportError: If vaderSentiment is not installed.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer = CharTokenizer()
        >>> Vader()(Prompt("a "), Preds(tokenizer, tokenizer.encode("lovely film")), True)
        0.5859
    """

    part: Literal["compound", "pos", "neg", "neu"] = "compound"
    reads: Reads = "completion"

    def __post_init__(self) -> None:
        check_choice("part", self.part, ("compound", "pos", "neg", "neu"))
        check_choice("reads", self.reads, ("completion", "whole"))
        with needs("sentiment", "vaderSentiment", "Vader"):
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        self._analyzer = SentimentIntensityAnalyzer()

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score of a row."""
        return self.score_text(read_text(self.reads, prompt, preds))

    def score_text(self, text: str) -> float:
        """Return the score of a text by itself."""
        # A dict of all four scores: "compound" is rounded to 4 digits, the shares to 3.
        return self._analyzer.polarity_scores(text)[self.part]
