"""Next-token training of small language models from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .training_loop import IGNORED, fit, similar_lengths


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

    The optimizer is AdamW with a one-cycle schedule; minibatches of similar lengths come in random order. Larger models
    are better trained by `agents.sft.tune`, which can be interrupted and resumed.

    Args:
        model: The model, changed in place.
        tokenizer: Its tokenizer.
        texts: The corpus.
        n_epochs: The number of passes over the corpus; may be a fraction.
        batch_size: The number of texts in a minibatch.
        learning_rate: The peak of the schedule.
        seed: The seed of the minibatches' order.
        description: The label of the progress bar.
        progress_bar: Whether to show a progress bar.

    Returns:
        The mean loss of the last tenth of the steps, in nats per token.

    Raises:
        ValueError: If there are no texts.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from agents import pretrain, word_tokenizer
        >>> tokenizer = word_tokenizer(["good", "film"])
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1))
        >>> pretrain(model, tokenizer, ["good film"] * 64, n_epochs=20, learning_rate=0.03, progress_bar=False) < 0.5
        True
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


def _next_token_loss(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the targets, in nats per token; both are (B, T)."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    # (B, T, V) -> (B * T, V) and (B, T) -> (B * T,)
    return functional.cross_entropy(logits.flatten(0, 1), targets.to(model.device).flatten(), ignore_index=IGNORED)


def _batches(
    sequences: Sequence[Sequence[int]], batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets forever, each (B, T), padded on the right."""
    for indices in similar_lengths([len(sequence) for sequence in sequences], batch_size, rng):
        chosen = [sequences[i] for i in indices]
        width = max(map(len, chosen))
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        targets = torch.full((len(chosen), width), IGNORED)
        for row, sequence in enumerate(chosen):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            targets[row, : len(sequence) - 1] = torch.tensor(sequence[1:])  # column t predicts token t + 1
        yield ids, targets
