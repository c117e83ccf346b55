"""Metrics of generated texts: callables over aligned lists of prompts, texts and references."""

from textenv.metrics.bootstrap import difference
from textenv.metrics.model import IntentAccuracy, Perplexity
from textenv.metrics.overlap import BLEU, METEOR, ROUGE, ChrF, SacreBLEU
from textenv.metrics.scores import Metric, Scores, mean_of
from textenv.metrics.surface import Broken, Distinct, Length

__all__ = [
    "BLEU",
    "METEOR",
    "ROUGE",
    "Broken",
    "ChrF",
    "Distinct",
    "IntentAccuracy",
    "Length",
    "Metric",
    "Perplexity",
    "SacreBLEU",
    "Scores",
    "difference",
    "mean_of",
]
