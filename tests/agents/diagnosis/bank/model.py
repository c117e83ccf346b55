"""The language of the bank: sentences about films and phones, and a one-layer model that has learned them."""

import random

import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from agents import word_tokenizer

THINGS = ("film", "phone", "camera", "lens", "hotel", "song")
GOOD = ("good", "great", "fine", "superb")
BAD = ("bad", "poor", "awful", "dull")
RARE = ("red", "old", "big", "small", "new", "odd", "wet", "dry")
OTHERS = ("the", "this", "is", "was", "very", "quite", "and", "but", ".", "question", "answer", ":")
PROMPTS = tuple(f"{article} {thing}" for article in ("the", "this") for thing in THINGS)
TEMPLATE = "{% for m in messages %}question : {{ m['content'] }} {% endfor %}answer :"
N_STEPS, N_SENTENCES = 150, 64


def tokenizer(template=None):
    """Return the tokenizer of the bank's words, maybe with a chat template."""
    made = word_tokenizer([*THINGS, *GOOD, *BAD, *RARE, *OTHERS])
    made.chat_template = template
    return made


def sentence(draw):
    """Return a sentence such as "the film was very good and the lens is odd ."."""

    def clause():
        words = [draw.choice(("the", "this")), draw.choice(THINGS), draw.choice(("is", "was"))]
        words += [draw.choice(("very", "quite"))] if draw.random() < 0.3 else []
        kind = draw.choices((GOOD, BAD, RARE), (0.4, 0.5, 0.1))[0]
        return [*words, draw.choice(kind)]

    words = clause()
    if draw.random() < 0.3:
        words += [draw.choice(("and", "but")), *clause()]
    return " ".join([*words, "."])


def write_model(folder, template=None, n_steps=N_STEPS, seed=0):
    """Write a one-layer GPT-2 that has learned the sentences for some steps; return its folder."""
    words, draw = tokenizer(template), random.Random(seed)
    end = words.eos_token_id
    torch.manual_seed(seed)
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), bos_token_id=end, eos_token_id=end, **shape, **drop))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(n_steps):
        rows = [[*words.encode(sentence(draw)), end] for _ in range(N_SENTENCES)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])  # (B, T)
        targets = torch.tensor([row + [-100] * (length - len(row)) for row in rows])  # (B, T)
        logits = model(input_ids=ids).logits[:, :-1]  # (B, T - 1, V)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
