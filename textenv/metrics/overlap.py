"""Metrics for overlap with reference texts: METEOR, ROUGE, BLEU, SacreBLEU and chrF, in [0, 1].

The score of each row (`Scores.per_row`) is that of the reward of the same name. The figures of METEOR, ROUGE and BLEU
are the means of these scores. SacreBLEU and chrF add up the counts of all rows and score the sums, as papers do, which
is not the mean of the rows' scores. The libraries come with `pip install "textenv[overlap]"`.
"""

from __future__ import annotations

from collections.abc import Sequence

from textenv.metrics.scores import Scores, check_references, mean_of
from textenv.rewards import overlap_measures as measures


class _MeanOverRows(measures.Measure):
    """A measure whose figure is the mean of the rows' scores."""

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the mean score, by the measure's name."""
        check_references(texts, references)
        return {self.name: mean_of([self.compare(text, own) for text, own in zip(texts, references, strict=True)])}


class _CorpusScore(measures.CountedMeasure):
    """A measure whose figure is the score of the counts of all rows together."""

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the score of the corpus, by the measure's name."""
        check_references(texts, references)
        # Resampled rows are scored by the sums of their counts, as a corpus of these rows would be.
        return {self.name: Scores(self.counts(texts, references), self.score_of)}


class METEOR(measures.METEOR, _MeanOverRows):
    """The mean METEOR of the texts: `meteor`, or `meteor_without_wordnet`; the options of `overlap_measures.METEOR`.

    Example:
        >>> scores = METEOR(wordnet=False)([""], ["the cats sat"], [["the cat sat"]])  # one chunk of three matches
        >>> round(scores["meteor_without_wordnet"].value, 4)
        0.9815
    """


class ROUGE(measures.ROUGE, _MeanOverRows):
    """The mean ROUGE of the texts, named by its kind: `rougeL`, ...; the options of `overlap_measures.ROUGE`.

    Example:
        >>> ROUGE("rouge1")([""], ["the cat sat"], [["the cat ran"]])["rouge1"].value == 2 / 3
        True
    """


class BLEU(measures.BLEU, _MeanOverRows):
    """The mean BLEU of single texts: `bleu`; the options of `overlap_measures.BLEU`. `SacreBLEU` scores a corpus.

    Example:
        >>> round(BLEU(n=2)([""], ["the cat ran"], [["the cat sat"]])["bleu"].value, 4)  # sqrt(2/3 * 1/2)
        0.5774
    """


class SacreBLEU(measures.SacreBLEU, _CorpusScore):
    """The BLEU of the texts as one corpus, divided by 100: `sacrebleu`; the options of `overlap_measures.SacreBLEU`.

    Example:
        >>> round(SacreBLEU()([""], ["the cat sat on the mat"], [["the cat sat on the mat"]])["sacrebleu"].value, 4)
        1.0
    """


class ChrF(measures.ChrF, _CorpusScore):
    """The chrF of the texts as one corpus, divided by 100: `chrf`, or `chrf++`; the options of `overlap_measures.ChrF`.

    Example:
        >>> round(ChrF()([""], ["a cat"], [["a cat"]])["chrf"].value, 4)
        1.0
    """
