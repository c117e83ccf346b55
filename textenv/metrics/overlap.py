"""Metrics of the overlap of texts with references, each computed by the library that others quote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from textenv.extras import needs
from textenv.metrics.scores import Scores, check_references, mean_of
from textenv.wordnet import NoWordNet, installed_wordnet

Split = Callable[[str], list[str]]
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def words_and_marks(text: str) -> list[str]:
    """Return the words and the runs of punctuation marks of a text, as nltk's `wordpunct_tokenize` does.

    Example:
        >>> words_and_marks("It isn't good...")
        ['It', 'isn', "'", 't', 'good', '...']
    """
    return re.findall(r"\w+|[^\w\s]+", text)


class ROUGE:
    """ROUGE F1 in [0, 1] by rouge_score: `rouge1`, `rouge2`, `rougeL`, `rougeLsum` (Lin, 2004).

    The mean over the rows of the best reference's F1. `rougeLsum` takes lines for sentences. Needs
    `pip install "textenv[overlap]"`.

    Args:
        types: Which of them.
        use_stemmer: Whether words are compared by their stems (Porter).
        split: Cuts a text into words. None takes rouge_score's own, lower-case ASCII letters and digits, which finds no
            words in other scripts: give `list` for Chinese. With one of your own there is no stemming.

    Raises:
        ImportError: Without rouge_score.

    Example:
        >>> rouge = ROUGE(["rouge1"])
        >>> rouge([""], ["the cat sat"], [["the cat ran"]])["rouge1"].value == 2 / 3
        True
    """

    def __init__(
        self, types: Sequence[str] = ROUGE_TYPES, use_stemmer: bool = False, split: Split | None = None
    ) -> None:
        with needs("overlap", "rouge_score", "the metric ROUGE"):
            from rouge_score.rouge_scorer import RougeScorer
        unknown = [one for one in types if not re.fullmatch(r"rouge([1-9]|L|Lsum)", one)]
        if unknown or not types:
            raise ValueError(f"Expected `types` among {list(ROUGE_TYPES)} or another rouge<n>, got {list(types)}.")
        self.types = tuple(types)
        self.scorer = RougeScorer(list(types), use_stemmer, tokenizer=None if split is None else _Splitter(split))

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the mean F1 of each type."""
        check_references(texts, references)
        rows = [self.scorer.score_multi(own, text) for text, own in zip(texts, references, strict=True)]
        return {one: mean_of([row[one].fmeasure for row in rows]) for one in self.types}


class _Splitter:
    """A function in the place of one of rouge_score's tokenizers."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def tokenize(self, text: str) -> list[str]:
        return self.split(text)


class Meteor:
    """METEOR in [0, 1] by nltk (Banerjee and Lavie, 2005): words matched exactly, by stem and by WordNet's synonyms.

    The mean over the rows of the best reference's score. Its name says what was measured: `meteor` where WordNet's data
    is installed (`python -m nltk.downloader wordnet`), else `meteor_without_wordnet`, which matches no synonyms and is
    lower. Needs `pip install "textenv[overlap]"`.

    Args:
        split: Cuts a text into words, compared in lower case: by default at white space and around marks.

    Raises:
        ImportError: Without nltk.

    Example:
        >>> scores = Meteor()([""], ["the cats sat"], [["the cat sat"]])  # one chunk of three matches
        >>> [round(score.value, 4) for score in scores.values()]
        [0.9815]
    """

    def __init__(self, split: Split = words_and_marks) -> None:
        self.split = split
        self.wordnet = installed_wordnet()
        self.name = "meteor" if self.wordnet is not None else "meteor_without_wordnet"

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the mean score."""
        with needs("overlap", "nltk", "the metric METEOR"):
            from nltk.translate.meteor_score import meteor_score

        check_references(texts, references)
        values = [
            meteor_score([self.split(one) for one in own], self.split(text), wordnet=self.wordnet or NoWordNet())
            for text, own in zip(texts, references, strict=True)
        ]
        return {self.name: mean_of(values)}


class BLEU:
    """Corpus BLEU in [0, 100] by SacreBLEU (Post, 2018): `sacrebleu`. Needs `pip install "textenv[overlap]"`.

    Args:
        tokenize: SacreBLEU's tokenizer: "13a", "zh", "char", ...
        lowercase: Whether case is ignored.

    Raises:
        ImportError: Without sacrebleu.

    Example:
        >>> round(BLEU()([""], ["the cat sat on the mat"], [["the cat sat on the mat"]])["sacrebleu"].value)
        100
    """

    def __init__(self, tokenize: str = "13a", lowercase: bool = False) -> None:
        with needs("overlap", "sacrebleu", "the metric BLEU"):
            from sacrebleu.metrics import BLEU as SacreBLEU
        self.scorer = SacreBLEU(tokenize=tokenize, lowercase=lowercase)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the BLEU of the corpus."""
        return {"sacrebleu": _corpus_scores(self.scorer, texts, references)}


class ChrF:
    """Corpus chrF in [0, 100] by SacreBLEU (Popović, 2015): `chrf`, or `chrf++` with words.

    Needs `pip install "textenv[overlap]"`.

    Args:
        word_order: The longest n-gram of words that is counted beside those of characters; 2 is chrF++.

    Raises:
        ImportError: Without sacrebleu.

    Example:
        >>> round(ChrF()([""], ["a cat"], [["a cat"]])["chrf"].value)
        100
    """

    def __init__(self, word_order: int = 0) -> None:
        with needs("overlap", "sacrebleu", "the metric chrF"):
            from sacrebleu.metrics import CHRF
        self.scorer = CHRF(word_order=word_order)
        self.name = "chrf" + "+" * word_order

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the chrF of the corpus."""
        return {self.name: _corpus_scores(self.scorer, texts, references)}


def _corpus_scores(scorer: Any, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Return a figure of SacreBLEU by the counts that each row adds; sums of them are what it computes a corpus from.

    Its public methods do not give the rows of chrF. Its own bootstrap (`sacrebleu.significance`) reads these two.
    """
    check_references(texts, references)
    width = max(len(own) for own in references)
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(width)]
    rows = np.array(scorer._extract_corpus_statistics(texts, streams), dtype=np.float64)

    def figure(sums: np.ndarray) -> float:
        return float(scorer._compute_score_from_stats(sums.tolist()).score)

    return Scores(rows, figure)
