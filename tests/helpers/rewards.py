"""Rows of prompts and texts for the tests of rewards, and their checked scores."""

from textenv import CharTokenizer, Preds, Prompt
from textenv.episodes.scores import check_rewards

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TOKENIZER = CharTokenizer(ALPHABET)


def preds_of(text, **kwargs):
    return Preds(TOKENIZER, TOKENIZER.encode(text), **kwargs)


def rows(texts, prompts=None, references=(), row=None):
    """Return the prompts, completions and `done` flags of finished rows."""
    prompts = prompts or ["p "] * len(texts)
    return [Prompt(p, references=references, row=row) for p in prompts], list(map(preds_of, texts)), [True] * len(texts)


def scores(reward, texts, **kwargs):
    """Score texts as one batch; return the checked values."""
    prompts, preds, dones = rows(texts, **kwargs)
    return [score.value for score in check_rewards(reward.score(prompts, preds, dones), prompts, preds)]
