"""A small language model from scratch on a list of texts: a tokenizer trained on them, and next-token prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

EOS_TOKEN = "</s>"
UNKNOWN_TOKEN = "<unk>"
IGNORED = -100  # what cross_entropy leaves out
POOL = 16  # minibatches that are sorted by length together

Batch = TypeVar("Batch")


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word, for texts whose words stand between spaces.

    Token 0 ends a text; an unknown word is the token `<unk>`.

    Example:
        >>> from agents.pretrain import word_tokenizer
        >>> word_tokenizer(["good", "film"]).encode("good film")
        [2, 3]
    """
    vocabulary = {word: i for i, word in enumerate([EOS_TOKEN, UNKNOWN_TOKEN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, unk_token=UNKNOWN_TOKEN, pad_token=EOS_TOKEN
    )


def char_tokenizer(texts: Sequence[str], min_count: int = 1) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character, as suits Chinese; its texts come back without spaces between.

    Token 0 ends a text; a character that `texts` have less than `min_count` times is the token `<unk>`, and so is one
    that they do not have. The commonest characters have the lowest ids.

    Example:
        >>> from agents.pretrain import char_tokenizer
        >>> tokenizer = char_tokenizer(["很好，很好", "很贵"])
        >>> tokenizer.encode("很贵，好"), tokenizer.decode([2, 3, 0], skip_special_tokens=True)
        ([2, 5, 4, 3], '很好')
    """
    counts = Counter(char for text in texts for char in text)
    chars = [char for char, count in counts.most_common() if count >= min_count]
    vocabulary = {token: i for i, token in enumerate([EOS_TOKEN, UNKNOWN_TOKEN, *chars])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without a decoder, tokens are joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        pad_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def bpe_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `vocab_size` tokens trained on `texts`; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    n_epochs: float = 1.0,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    description: str = "pretraining",
    progress_bar: bool = True,
) -> float:
    """Train a causal language model to continue texts, each closed by the end token.

    AdamW with a one-cycle schedule; minibatches of similar lengths in random order.

    Args:
        model: The model, changed in place.
        tokenizer: Its tokenizer.
        texts: The corpus.
        n_epochs: Passes over it; may be a fraction.
        batch_size: Texts of a minibatch.
        learning_rate: The schedule's peak.
        seed: The seed of the minibatches' order.
        description: What the progress bar says.
        progress_bar: Show one.

    Returns:
        The mean loss of the last tenth, in nats a token.

    Raises:
        ValueError: If there are no texts.
    """
    if not texts:
        raise ValueError("Expected at least one text, got none.")
    sequences = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    n_steps = max(1, round(n_epochs * len(sequences) / batch_size))
    batches = _batches(sequences, batch_size, np.random.default_rng(seed))
    losses = fit(
        model,
        batches,
        lambda batch: _next_token_loss(model, *batch),
        n_steps,
        learning_rate,
        description=description,
        progress_bar=progress_bar,
    )
    return float(losses[-max(1, n_steps // 10) :].mean())


class FitRun(AbstractContextManager[object], Protocol):
    """A training by `fit` that can be stopped and resumed; entered while it lasts. `ResumableFit` keeps it on disk."""

    def load(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Bring model and optimizer to the state to go on from; return the loss of each step made before."""
        ...

    def after_step(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, losses: list[Tensor], n_steps: int
    ) -> None:
        """Save the state where it is due, and raise where the training is to stop; `losses` has one item a step."""
        ...


def fit(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    n_steps: int,
    learning_rate: float,
    *,
    description: str,
    progress_bar: bool = True,
    run: FitRun | None = None,
) -> Tensor:
    """Minimise a loss, a minibatch a step: AdamW with a one-cycle schedule, gradients clipped at a norm of 1.

    Args:
        model: The model, changed in place; in evaluation mode afterwards.
        batches: Gives the next minibatch, each time in the same order.
        loss_of: The loss of a minibatch; it draws no random numbers.
        n_steps: How many steps.
        learning_rate: The schedule's peak.
        description: What the progress bar says.
        progress_bar: Show one.
        run: Saves the state every so often and stops after a signal; None does neither.

    Returns:
        The loss of each step, (n_steps,).
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    rising = 0.2 if n_steps == 10 else 0.1  # a tenth of 10 steps has no length, by which torch divides
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps, pct_start=rising)
    seen = [] if run is None else run.load(model, optimizer)
    if seen:
        schedule.load_state_dict({"last_epoch": len(seen), "_step_count": len(seen) + 1})
    model.train()
    with (
        nullcontext() if run is None else run,
        tqdm(total=n_steps, initial=len(seen), desc=description, disable=not progress_bar, unit="step") as bar,
    ):
        for batch in islice(batches, len(seen), n_steps):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            seen.append(loss.detach())
            bar.update()
            if len(seen) % 20 == 0:
                bar.set_postfix(loss=f"{float(seen[-1]):.3f}")
            if run is not None:
                run.after_step(model, optimizer, seen, n_steps)
    model.eval()
    return torch.stack(seen)


def _next_token_loss(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets.to(model.device).flatten(), ignore_index=IGNORED)


def similar_lengths(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield the places of minibatches for ever, each place once a pass, in random order but of similar lengths."""
    while True:
        order = rng.permutation(len(lengths))
        groups = []
        for start in range(0, len(order), POOL * batch_size):
            pool = sorted(order[start : start + POOL * batch_size], key=lambda i: lengths[i])
            groups += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for place in rng.permutation(len(groups)):
            yield groups[place]


def _batches(
    sequences: Sequence[Sequence[int]], batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, each (B, T), for ever."""
    for places in similar_lengths([len(sequence) for sequence in sequences], batch_size, rng):
        chosen = [sequences[i] for i in places]
        width = max(map(len, chosen))
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        targets = torch.full((len(chosen), width), IGNORED)
        for row, sequence in enumerate(chosen):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            targets[row, : len(sequence) - 1] = torch.tensor(sequence[1:])
        yield ids, targets
