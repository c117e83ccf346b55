"""What the tests of rewards share: rows of prompts and texts."""

from textenv import CharTokenizer, Preds, Prompt
from textenv.episodes.scores import check_rewards

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TOKENIZER = CharTokenizer(ALPHABET)


def preds_of(text, **kwargs):
    return Preds(TOKENIZER, TOKENIZER.encode(text), **kwargs)


def rows(texts, prompts=None, references=(), row=None):
    """Prompts, completions and dones of finished rows."""
    prompts = prompts or ["p "] * len(texts)
    return [Prompt(p, references=references, row=row) for p in prompts], list(map(preds_of, texts)), [True] * len(texts)


def scores(reward, texts, **kwargs):
    """The checked values of a batch."""
    prompts, preds, dones = rows(texts, **kwargs)
    return [one.value for one in check_rewards(reward.score(prompts, preds, dones), prompts, preds)]
