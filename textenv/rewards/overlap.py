"""Overlap of the completion with reference texts: METEOR, ROUGE, BLEU, SacreBLEU and chrF, by the usual libraries.

All are of one text and lie in [0, 1], and see `prompt.references` (`TextEnv(references_column=...)`). They need
`pip install "textenv[overlap]"`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from textenv.completion import Preds
from textenv.extras import needs
from textenv.prompts import Prompt
from textenv.rewards.base import RowReward, check_choice, read_references
from textenv.wordnet import NoWordNet, installed_wordnet


def _words(text: str) -> list[str]:
    with needs("overlap", "nltk", "the words of METEOR and BLEU"):
        from nltk.tokenize import wordpunct_tokenize
    return wordpunct_tokenize(text)


@dataclass
class Meteor(RowReward):
    """METEOR (Lavie and Agarwal 2007, equations 1 to 4), by nltk; the best of several references.

    Words match exactly, by their stem and, with WordNet, as synonyms; case is ignored. Words and signs are split by
    nltk's `wordpunct_tokenize`, which needs no data. Figures with and without WordNet do not compare.

    Args:
        wordnet: Whether synonyms match. None: where WordNet is installed (`nltk.download("wordnet")`), with a warning
            where not.

    Attributes:
        label: "METEOR", or "METEOR (without WordNet)": what to call it in a table.

    Raises:
        LookupError: If `wordnet=True` and it is not installed.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> meteor = Meteor(wordnet=False)
        >>> round(meteor(prompt, Preds(tokenizer, tokenizer.encode("the cats sat")), True), 4), meteor.label
        (0.9815, 'METEOR (without WordNet)')
    """

    wordnet: bool | None = None

    def __post_init__(self) -> None:
        with needs("overlap", "nltk", "the reward Meteor"):
            from nltk.translate.meteor_score import meteor_score
        self._meteor_score = meteor_score
        self._has_wordnet = self.wordnet is not False and installed_wordnet() is not None
        if self.wordnet and not self._has_wordnet:
            raise LookupError("Expected WordNet to be installed: nltk.download('wordnet').")
        if self.wordnet is None and not self._has_wordnet:
            warnings.warn(
                "Meteor runs without WordNet, whose figures are lower: install it by nltk.download('wordnet'), or "
                "say wordnet=False.",
                stacklevel=3,
            )

    @property
    def label(self) -> str:
        """What to call it in a table."""
        return "METEOR" if self._has_wordnet else "METEOR (without WordNet)"

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score, in [0, 1]."""
        references = [_words(reference) for reference in read_references(prompt)]
        wordnet = installed_wordnet() if self._has_wordnet else None
        return float(self._meteor_score(references, _words(preds.text), wordnet=wordnet or NoWordNet()))


@dataclass
class Rouge(RowReward):
    """ROUGE (Lin 2004), by rouge_score; the best of several references.

    Of English: its words are made of a to z and 0 to 9, and nothing else counts.

    Args:
        kind: "rouge1", "rouge2" (n-grams), "rougeL" (longest common subsequence) or "rougeLsum" (the same, line by
            line).
        measure: "fmeasure", "precision" or "recall".
        stem: Whether words are compared by their stem.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> Rouge("rouge1", "recall")(prompt, Preds(tokenizer, tokenizer.encode("a cat")), True) == 1 / 3
        True
    """

    kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    measure: Literal["fmeasure", "precision", "recall"] = "fmeasure"
    stem: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("rouge1", "rouge2", "rougeL", "rougeLsum"))
        check_choice("measure", self.measure, ("fmeasure", "precision", "recall"))
        with needs("overlap", "rouge_score", "the reward Rouge"):
            from rouge_score.rouge_scorer import RougeScorer
        self._scorer = RougeScorer([self.kind], use_stemmer=self.stem)

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score, in [0, 1]."""
        scores = [self._scorer.score(reference, preds.text)[self.kind] for reference in read_references(prompt)]
        return float(max(score._asdict()[self.measure] for score in scores))


@dataclass
class Bleu(RowReward):
    """BLEU of one text (Papineni et al. 2002), by nltk, words split by `wordpunct_tokenize`.

    N-grams that never match count as 0.1 matches (Chen and Cherry 2014, smoothing 1). The BLEU of a corpus is something
    else than the mean of these.

    Args:
        n: The longest n-gram.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> round(Bleu(n=2)(prompt, Preds(tokenizer, tokenizer.encode("the cat ran")), True), 4)  # sqrt(2/3 * 1/2)
        0.5774
    """

    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Expected `n` to be at least 1, got {self.n}.")
        with needs("overlap", "nltk", "the reward Bleu"):
            from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        self._sentence_bleu, self._smooth = sentence_bleu, SmoothingFunction().method1

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score, in [0, 1]."""
        references = [_words(reference) for reference in read_references(prompt)]
        words = _words(preds.text)
        return float(self._sentence_bleu(references, words, [1 / self.n] * self.n, self._smooth)) if words else 0.0


@dataclass
class SacreBleu(RowReward):
    """BLEU of one text by sacrebleu, over 100 (Post 2018), with its own tokenizers and smoothing ("exp").

    N-grams that are longer than the text are left out (`effective_order`).

    Args:
        tokenize: How words are split: "13a" (its default), "zh", "ja-mecab", "char" and so on.
        lowercase: Whether case is ignored.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> round(SacreBleu()(prompt, Preds(tokenizer, tokenizer.encode("the cat sat")), True), 4)
        1.0
    """

    tokenize: str = "13a"
    lowercase: bool = False

    def __post_init__(self) -> None:
        with needs("overlap", "sacrebleu", "the reward SacreBleu"):
            from sacrebleu.metrics import BLEU
        self._metric = BLEU(tokenize=self.tokenize, lowercase=self.lowercase, effective_order=True)

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score, in [0, 1]."""
        return float(self._metric.sentence_score(preds.text, read_references(prompt)).score) / 100


@dataclass
class Chrf(RowReward):
    """The F-score of character n-grams (chrF, Popović 2015) by sacrebleu, over 100.

    Args:
        word_order: The longest n-gram of words that counts too: 0 for chrF, 2 for chrF++ (Popović 2017).
        lowercase: Whether case is ignored.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer, prompt = CharTokenizer(), Prompt("a", references=["the cat sat"])
        >>> round(Chrf()(prompt, Preds(tokenizer, tokenizer.encode("the cat sat")), True), 4)
        1.0
    """

    word_order: int = 0
    lowercase: bool = False

    def __post_init__(self) -> None:
        with needs("overlap", "sacrebleu", "the reward Chrf"):
            from sacrebleu.metrics import CHRF
        self._metric = CHRF(word_order=self.word_order, lowercase=self.lowercase)

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score, in [0, 1]."""
        return float(self._metric.sentence_score(preds.text, read_references(prompt)).score) / 100
