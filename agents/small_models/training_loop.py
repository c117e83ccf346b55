"""The training loop of small models, reward models and critics: minibatches of similar length, AdamW, saved states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .progress import progress

IGNORED = -100  # the target that torch's `cross_entropy` and transformers' losses leave out
POOL = 16  # minibatches whose texts are sorted by length together: little padding, yet a random order

Batch = TypeVar("Batch")


class FitRun(AbstractContextManager[object], Protocol):
    """The saved state of a call of `fit`, which can be stopped and resumed; a context around its steps.

    `ResumableFit` keeps the state on disk.
    """

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Load the saved state into model and optimizer; return the loss of each step that was already made."""
        ...

    def after_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[Tensor], n_steps: int
    ) -> None:
        """Save the state when a save is due, and raise when training should stop; `losses` has one item per step."""
        ...


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    n_steps: int,
    learning_rate: float,
    *,
    description: str,
    progress_bar: bool = True,
    run: FitRun | None = None,
) -> Tensor:
    """Minimise a loss, one minibatch per step: AdamW with a one-cycle schedule, gradients clipped at a norm of 1.

    Args:
        model: The model, changed in place; in evaluation mode afterwards.
        batches: The minibatches, in the same order each time: a resumed run skips those of the steps already made.
        loss_of: A function from a minibatch to its loss; it draws no random numbers.
        n_steps: The number of steps.
        learning_rate: The peak of the schedule.
        description: The label of the progress bar.
        progress_bar: Whether to show a progress bar.
        run: Saves the state at intervals and stops the training after a signal; None does neither.

    Returns:
        The loss of each step, (n_steps,).
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # The betas are those of GPT-3 (Brown et al., 2020, appendix B); the weight decay is torch's default.
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    # torch's OneCycleLR divides by the warm-up's length, pct_start * total_steps - 1, which is 0 for a tenth of 10.
    warm_up = 0.2 if n_steps == 10 else 0.1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps, pct_start=warm_up)
    losses = [] if run is None else run.load(model, optimizer)
    if losses:
        # The schedule depends on the step number alone; its constructor has already counted one step.
        schedule.load_state_dict({"last_epoch": len(losses), "_step_count": len(losses) + 1})
    model.train()
    with (
        nullcontext() if run is None else run,
        progress(
            total=n_steps, initial=len(losses), description=description, unit="step", is_shown=progress_bar
        ) as bar,
    ):
        for batch in islice(batches, len(losses), n_steps):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())  # stays on the device: `float` would wait for the device in every step
            bar.update()
            if len(losses) % 20 == 0:  # seldom, since `float` waits for the device
                bar.set_postfix(loss=f"{float(losses[-1]):.3f}", refresh=False)
            if run is not None:
                run.after_step(model, optimizer, losses, n_steps)
    model.eval()
    return torch.stack(losses)


def similar_lengths(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield minibatches of similar lengths forever, as lists of indices; a pass has each index once, in random order.

    Args:
        lengths: The length of each row, in tokens.
        batch_size: The number of rows in a minibatch; the last of a pool may have fewer.
        rng: The source of the order.
    """
    while True:
        order = rng.permutation(len(lengths))
        minibatches = []
        for start in range(0, len(order), POOL * batch_size):
            pool = sorted(order[start : start + POOL * batch_size], key=lambda i: lengths[i])
            minibatches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for number in rng.permutation(len(minibatches)):
            yield minibatches[number]
