"""The reward `Likelihood`: token by token, alone and in a batch."""

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from agents import bpe_tokenizer
from tests.helpers.rewards import TOKENIZER, preds_of
from tests.helpers.training import tiny_config
from textenv import EndReason, Preds, Prompt
from textenv.rewards.likelihood import Likelihood

CORPUS = ["a good film and a bad plot", "the film was good"] * 5
ROWS = [("a good ", "film"), ("the film", " was good and bad"), ("a", ""), ("goo", "d film"), ("the film was ", "bad")]


def build(**kwargs):
    torch.manual_seed(0)
    tokenizer = bpe_tokenizer(CORPUS, 280)
    model = GPT2LMHeadModel(tiny_config(len(tokenizer), initializer_range=0.5))
    return Likelihood(model, tokenizer=tokenizer, **kwargs)


def one_by_one(reward, prompt, text, ends):
    """Return the mean log-probability of the tokens that end after the prompt, with one forward per token."""
    tokenizer, model = reward.tokenizer, reward.model.eval()
    ids = tokenizer(prompt + text)["input_ids"] + ([0] if ends or not text else [])
    log_probs = []
    for index in range(1, len(ids)):
        if len(tokenizer.decode(ids[: index + 1], skip_special_tokens=False)) > len(prompt):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:index]])).logits[0, -1]
            log_probs.append(float(logits.log_softmax(0)[ids[index]]))
    return np.mean(log_probs)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("ends", [False, True])
def test_the_same_as_one_token_at_a_time(ends, batch_size):
    reward = build(batch_size=batch_size)
    preds = [preds_of(text) for _, text in ROWS]
    if ends:
        preds = [Preds(TOKENIZER, [*text.ids, 0], end_reason=EndReason.EOS) for text in preds]
    rewards = reward.score([Prompt(prompt) for prompt, _ in ROWS], preds, [True] * len(ROWS))
    expected = [one_by_one(reward, prompt, text, ends) for prompt, text in ROWS]
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert len(set(rewards)) == len(ROWS) and max(rewards) < 0.0


def test_long_prompts_lose_their_start():
    reward = build()
    prompt, preds = Prompt("a good film and" + " a good film and" * 20), preds_of(" the plot")
    kept = reward.tokenizer(str(prompt) + " the plot")["input_ids"][-32:]
    n_judged = len(reward.tokenizer(" the plot")["input_ids"])
    with torch.no_grad():
        log_probs = reward.model(torch.tensor([kept])).logits[0].log_softmax(-1)
    indices = range(len(kept) - n_judged, len(kept))
    expected = np.mean([float(log_probs[index - 1, kept[index]]) for index in indices])
    assert reward(prompt, preds, True) == pytest.approx(expected, abs=1e-5)
    assert all(weight.grad is None for weight in reward.model.parameters())


def test_a_tokenizer_without_end_token_is_named():
    reward = build()
    reward.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="with an end token"):
        Likelihood(reward.model, tokenizer=reward.tokenizer)
