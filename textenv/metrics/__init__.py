"""Metrics of generated texts: callables over aligned lists of prompts, texts and references."""

from textenv.metrics.model import IntentAccuracy, Perplexity
from textenv.metrics.overlap import BLEU, ROUGE, ChrF, Meteor
from textenv.metrics.scores import Metric, Scores, mean_of
from textenv.metrics.surface import Distinct, Length

__all__ = [
    "BLEU",
    "ROUGE",
    "ChrF",
    "Distinct",
    "IntentAccuracy",
    "Length",
    "Meteor",
    "Metric",
    "Perplexity",
    "Scores",
    "mean_of",
]
