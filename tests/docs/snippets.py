"""The Python blocks of a page, run in order on tiny models that are saved under the names of the hub."""

import re

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from agents import bpe_tokenizer
from tests.helpers.seq2seq import T5

N_TOKENS = 300
GPT = dict(vocab_size=N_TOKENS, n_layer=1, n_embd=16, n_head=2, n_positions=256, pad_token_id=0)
BERT = dict(vocab_size=N_TOKENS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
ENDS = dict(bos_token_id=0, eos_token_id=0)
STAND_INS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT, **ENDS)),
    "rajkumarrrk/gpt2-fine-tuned-on-daily-dialog": (GPT2LMHeadModel, GPT2Config(**GPT, **ENDS)),
    "google/flan-t5-base": (T5ForConditionalGeneration, T5Config(**{**T5, "vocab_size": N_TOKENS})),
    "cardiffnlp/twitter-roberta-base-sentiment": (BertForSequenceClassification, BertConfig(**BERT, num_labels=3)),
    "rajkumarrrk/roberta-daily-dialog-intent-classifier": (
        BertForSequenceClassification,
        BertConfig(**BERT, num_labels=4),
    ),
    "my-reward-model": (GPT2ForSequenceClassification, GPT2Config(**GPT, **ENDS, num_labels=1)),
}
"""Tiny models, saved in the working directory under names of the hub: `from_pretrained` looks there first."""


def fill_hub(folder):
    """Save a tiny model and a tokenizer in the folder for every name of the pages."""
    tokenizer = bpe_tokenizer(["the film was great and this phone is good"] * 9, N_TOKENS)
    torch.manual_seed(0)
    for name, (model, config) in STAND_INS.items():
        model(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def snippets(text):
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_for_one_rollout(blocks, name, names=None):
    """Run snippets in one namespace, in which `learn` stops after the first rollout; return the namespace."""
    names = {} if names is None else names
    for block in blocks:
        short, n_changed = re.subn(r"\.learn\([\d_ *]+", ".learn(1", block)
        assert n_changed == block.count(".learn(")
        exec(compile(short, name, "exec"), names)
    return names
