"""Measures of the overlap of a text with reference texts: METEOR, ROUGE, BLEU, SacreBLEU and chrF.

`textenv.rewards` has each measure as a reward and `textenv.metrics` as a metric, of the same name and options. All lie
in [0, 1], since rewards are added up, and a reward that is a hundred times as large would drown the others. Papers
report SacreBLEU and chrF times 100.

The libraries come with `pip install "textenv[overlap]"`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from textenv.checks.extras import needs
from textenv.rewards.base import check_choice
from textenv.rewards.wordnet import NoWordNet, installed_wordnet

Split = Callable[[str], Sequence[str]]


class Measure(ABC):
    """Base class of the measures: the score of one text against its references."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the figure in tables and logs."""

    @abstractmethod
    def compare(self, text: str, references: Sequence[str]) -> float:
        """Return the score of a text, in [0, 1], against one or more references."""


@dataclass
class METEOR(Measure):
    """METEOR (Lavie and Agarwal, 2007, equations 1 to 4) by nltk; the best of several references.

    Words match exactly, by their stem (Porter's) and, with WordNet, as synonyms; case is ignored. Scores with and
    without WordNet cannot be compared, so their names differ: `meteor` and `meteor_without_wordnet`.

    Args:
        wordnet: Whether synonyms match. None: if WordNet is installed (`python -m nltk.downloader wordnet`).
        split: The function that cuts a text into words. None takes nltk's `wordpunct_tokenize`, which cuts at white
            space and around punctuation. Pass `list` for texts without spaces, such as Chinese.

    Raises:
        ImportError: If nltk is not installed.
        LookupError: If `wordnet=True` and WordNet is not installed.
        ValueError: If `split` is no function.
    """

    wordnet: bool | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        with needs("overlap", "nltk", "METEOR"):
            from nltk.translate.meteor_score import meteor_score
        self._meteor_score = meteor_score
        self._words = _words_and_marks if self.split is None else _checked_split(self.split)
        self.has_wordnet = self.wordnet is not False and installed_wordnet() is not None
        if self.wordnet and not self.has_wordnet:
            raise LookupError("Expected WordNet to be installed: nltk.download('wordnet').")

    @property
    def name(self) -> str:
        """The name of the figure, which says whether synonyms matched."""
        return "meteor" if self.has_wordnet else "meteor_without_wordnet"

    def compare(self, text: str, references: Sequence[str]) -> float:
        """Return the score of a text, in [0, 1]."""
        # A pickle may be read on a machine without WordNet, where the scores must not fall silently.
        wordnet = installed_wordnet() if self.has_wordnet else NoWordNet()
        if wordnet is None:
            raise LookupError("Expected WordNet to be installed here, too: nltk.download('wordnet').")
        words = [self._words(reference) for reference in references]
        return float(self._meteor_score(words, self._words(text), wordnet=wordnet))


@dataclass
class ROUGE(Measure):
    """ROUGE (Lin, 2004) by rouge_score; the best of several references.

    The figure is named by its kind, such as `rougeL`, and by its measure unless that is the F-measure: `rougeL_recall`.

    Args:
        kind: "rouge1" to "rouge9" (n-grams), "rougeL" (longest common subsequence) or "rougeLsum" (the same, with each
            line taken for a sentence).
        measure: "fmeasure", "precision" or "recall".
        stem: Whether words are compared by their stem (Porter's).
        split: The function that cuts a text into words. None takes rouge_score's own words of lower-case ASCII letters
            and digits; texts in other scripts would have no words: pass `list` for Chinese. With a function of your own
            there is no stemming.

    Raises:
        ImportError: If rouge_score is not installed.
        ValueError: If `kind` or `measure` is none of these, `split` is no function, or `stem` is given with it.
    """

    kind: str = "rougeL"
    measure: Literal["fmeasure", "precision", "recall"] = "fmeasure"
    stem: bool = False
    split: Split | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, [*(f"rouge{n}" for n in range(1, 10)), "rougeL", "rougeLsum"])
        check_choice("measure", self.measure, ("fmeasure", "precision", "recall"))
        if self.stem and self.split is not None:
            raise ValueError("Expected either `stem` or `split`, got both: the function has to stem its words itself.")
        with needs("overlap", "rouge_score", "ROUGE"):
            from rouge_score.rouge_scorer import RougeScorer
        tokenizer = None if self.split is None else _SplitTokenizer(_checked_split(self.split))
        self._scorer = RougeScorer([self.kind], use_stemmer=self.stem, tokenizer=tokenizer)

    @property
    def name(self) -> str:
        """The name of the figure."""
        return self.kind if self.measure == "fmeasure" else f"{self.kind}_{self.measure}"

    def compare(self, text: str, references: Sequence[str]) -> float:
        """Return the score of a text, in [0, 1]."""
        # Not rouge_score's `score_multi`, which takes the reference of the best F-measure, whatever `measure` is.
        scores = [self._scorer.score(reference, text)[self.kind] for reference in references]
        return float(max(score._asdict()[self.measure] for score in scores))


@dataclass
class BLEU(Measure):
    """BLEU of single texts (Papineni et al., 2002) by nltk, over words split by `wordpunct_tokenize`; named `bleu`.

    N-grams that never match count as 0.1 matches (Chen and Cherry, 2014, smoothing 1), so that short texts get a score.

    Args:
        n: The longest n-gram, in words.

    Raises:
        ImportError: If nltk is not installed.
        ValueError: If `n` is below 1.
    """

    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Expected `n` to be at least 1, got {self.n}.")
        with needs("overlap", "nltk", "BLEU"):
            from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        weights = [1 / self.n] * self.n
        self._bleu = partial(sentence_bleu, weights=weights, smoothing_function=SmoothingFunction().method1)

    @property
    def name(self) -> str:
        """The name of the figure."""
        return "bleu"

    def compare(self, text: str, references: Sequence[str]) -> float:
        """Return the score of a text, in [0, 1]."""
        return float(self._bleu([_words_and_marks(reference) for reference in references], _words_and_marks(text)))


class CountedMeasure(Measure):
    """Base class of the measures by sacrebleu, which score the n-gram counts of a text or of a corpus.

    The score of a corpus is computed from the sums of its texts' counts, and is not the mean of the texts' scores.
    """

    _scorer: Any

    def compare(self, text: str, references: Sequence[str]) -> float:
        """Return the score of a text, in [0, 1]."""
        return float(self._scorer.sentence_score(text, references).score) / 100

    def counts(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the counts of each text, (N, K) float64."""
        # sacrebleu takes references as streams: the i-th stream holds the i-th reference of each text, or None.
        most = max(len(own) for own in references)
        streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
        # sacrebleu has no public way to the rows' counts; its own bootstrap (`significance.py`) calls this method and
        # the one that `score_of` calls.
        return np.array(self._scorer._extract_corpus_statistics(texts, streams), dtype=np.float64)

    def score_of(self, counts: np.ndarray) -> float:
        """Return the score, in [0, 1], of the counts (K,) of a text or of the sums over a corpus."""
        return float(self._scorer._compute_score_from_stats(counts.tolist()).score) / 100  # sacrebleu's is in percent


@dataclass
class SacreBLEU(CountedMeasure):
    """BLEU by sacrebleu (Post, 2018) with its own tokenizers and smoothing ("exp"), divided by 100; named `sacrebleu`.

    N-grams that are longer than all texts are left out (sacrebleu's `effective_order`, "eff:yes" in its signature). The
    score of a corpus in which a text has four words or more does not depend on this.

    Args:
        tokenize: The name of sacrebleu's tokenizer: "13a" (its default), "zh", "ja-mecab", "char" and so on.
        lowercase: Whether case is ignored.

    Raises:
        ImportError: If sacrebleu is not installed.
    """

    tokenize: str = "13a"
    lowercase: bool = False

    def __post_init__(self) -> None:
        with needs("overlap", "sacrebleu", "SacreBLEU"):
            from sacrebleu.metrics import BLEU
        self._scorer = BLEU(tokenize=self.tokenize, lowercase=self.lowercase, effective_order=True)

    @property
    def name(self) -> str:
        """The name of the figure."""
        return "sacrebleu"


@dataclass
class ChrF(CountedMeasure):
    """The F-score of character n-grams (chrF; Popović, 2015) by sacrebleu, divided by 100; named `chrf`, or `chrf++`.

    Args:
        word_order: The longest n-gram of words that counts beside the n-grams of characters: 0 for chrF, 2 for chrF++
            (Popović, 2017).
        lowercase: Whether case is ignored.

    Raises:
        ImportError: If sacrebleu is not installed.
    """

    word_order: int = 0
    lowercase: bool = False

    def __post_init__(self) -> None:
        with needs("overlap", "sacrebleu", "ChrF"):
            from sacrebleu.metrics import CHRF
        self._scorer = CHRF(word_order=self.word_order, lowercase=self.lowercase)

    @property
    def name(self) -> str:
        """The name of the figure."""
        return "chrf" + "+" * self.word_order


def _words_and_marks(text: str) -> Sequence[str]:
    # Imported at each call and not kept in the object, since nltk 3.10's tokenizer does not work once it was pickled.
    with needs("overlap", "nltk", "the words of METEOR and BLEU"):
        from nltk.tokenize import wordpunct_tokenize
    return wordpunct_tokenize(text)


class _SplitTokenizer:
    """A function with the interface of rouge_score's `tokenizers.Tokenizer`."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def tokenize(self, text: str) -> Sequence[str]:
        return self.split(text)


def _checked_split(split: Any) -> Split:
    """Return the function; raise ValueError for anything else, such as a text from a configuration."""
    if not callable(split):
        raise ValueError(f"Expected `split` to be a function from a text to its words, got {split!r:.80}.")
    return split
