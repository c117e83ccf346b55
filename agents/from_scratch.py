"""Next-token training of small language models from scratch, and the training loop that reward models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .interrupted import States, load_state, stop_requests, write_state
from .manifest import of_our_making

IGNORED = -100  # what cross_entropy leaves out
POOL = 16  # minibatches that are sorted by length together

Batch = TypeVar("Batch")


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


def fit(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    n_steps: int,
    learning_rate: float,
    *,
    description: str,
    progress_bar: bool = True,
    states: States | None = None,
    state: Path | None = None,
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
        states: Where the state is written every so often, and when a signal asks to stop; None notes no signals.
        state: The one to go on from.

    Returns:
        The loss of each step, (n_steps,).

    Raises:
        StageStopped: With `states`, after a signal, once the state is saved.
        StorageError: If it could not be.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    rising = 0.2 if n_steps == 10 else 0.1  # a tenth of 10 steps has no length, by which torch divides
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps, pct_start=rising)
    seen: list[Tensor] = []
    if state is not None:
        with of_our_making(state):
            seen = load_state(state, model, optimizer)
        schedule.load_state_dict({"last_epoch": len(seen), "_step_count": len(seen) + 1})
    asked = stop_requests()
    model.train()
    with (
        nullcontext() if states is None else asked,
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
            is_asked = asked.number != 0 and len(seen) < n_steps
            if states is not None and (is_asked or states.is_due(len(seen))):
                states.save(len(seen), lambda folder: write_state(folder, model, optimizer, seen))
            if states is not None and is_asked:
                raise states.stopped(len(seen), asked.number)
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
