"""Rewards for overlap with the prompt's reference texts: METEOR, ROUGE, BLEU, SacreBLEU and chrF, in [0, 1].

The references are `prompt.references` (`TextEnv(references_column=...)`). The libraries come with
`pip install "textenv[overlap]"`.
"""

from __future__ import annotations

import warnings

from textenv.episodes.completion import Preds
from textenv.prompts.prompts import Prompt
from textenv.rewards import overlap_measures as measures
from textenv.rewards.base import RowReward, read_references


class _OverlapReward(measures.Measure, RowReward):
    """A measure as the reward of each finished text."""

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score, in [0, 1]."""
        return self.compare(preds.text, read_references(prompt))


class METEOR(measures.METEOR, _OverlapReward):
    """METEOR as a reward, with the options of `overlap_measures.METEOR`; it warns if WordNet is not installed.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> meteor = METEOR(wordnet=False)
        >>> round(meteor(prompt, Preds(tokenizer, tokenizer.encode("the cats sat")), True), 4), meteor.name
        (0.9815, 'meteor_without_wordnet')
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wordnet is None and not self.has_wordnet:
            warnings.warn(
                "METEOR runs without WordNet, whose figures are lower: install it by nltk.download('wordnet'), or "
                "say wordnet=False.",
                stacklevel=3,  # the line that builds the reward: above are this method and the dataclass's `__init__`
            )


class ROUGE(measures.ROUGE, _OverlapReward):
    """ROUGE as a reward, with the options of `overlap_measures.ROUGE`.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> ROUGE("rouge1", "recall")(prompt, Preds(tokenizer, tokenizer.encode("a cat")), True) == 1 / 3
        True
    """


class BLEU(measures.BLEU, _OverlapReward):
    """BLEU of each text as a reward, with the options of `overlap_measures.BLEU`.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> round(BLEU(n=2)(prompt, Preds(tokenizer, tokenizer.encode("the cat ran")), True), 4)  # sqrt(2/3 * 1/2)
        0.5774
    """


class SacreBLEU(measures.SacreBLEU, _OverlapReward):
    """SacreBLEU of each text as a reward, with the options of `overlap_measures.SacreBLEU`.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> round(SacreBLEU()(prompt, Preds(tokenizer, tokenizer.encode("the cat sat")), True), 4)
        1.0
    """


class ChrF(measures.ChrF, _OverlapReward):
    """Character F-score of each text as a reward, with the options of `overlap_measures.ChrF`.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> round(ChrF()(prompt, Preds(tokenizer, tokenizer.encode("the cat sat")), True), 4)
        1.0
    """
