"""The `Trainer` of transformers as SFT and classifiers run it: interruptible and resumable. Needs accelerate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .interrupted import States, stop_requests
from .interrupts import Interrupts


def training_arguments(
    work: Path, n_epochs: float, batch_size: int, learning_rate: float, seed: int, progress_bar: bool
) -> TrainingArguments:
    """Return what the `Trainer` is told, without reports to anyone."""
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=n_epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        disable_tqdm=not progress_bar,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        save_strategy="no",  # `_Saving` says when, and `States` which of them stays
        logging_steps=20,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch on leaving: the `Trainer` seeds all of them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class SealedTrainer(Trainer):
    """A `Trainer` whose checkpoints are sealed once they are whole; one that cannot be written is tried again.

    Args:
        states: What seals them, and knows where they are.
        **kwargs: As of `Trainer`.
    """

    def __init__(self, states: States, **kwargs: Any) -> None:
        self.states = states
        super().__init__(**kwargs)

    def _save_checkpoint(self, *args: Any) -> None:
        save = super()._save_checkpoint
        self.states.save(self.state.global_step, lambda folder: save(*args))  # it knows the folder by the step


class _Saving(TrainerCallback):
    """Says when the state is saved, and stops behind the step in which a signal came."""

    def __init__(self, states: States, asked: Interrupts) -> None:
        self.states, self.asked = states, asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_asked = self.asked.number != 0
        control.should_save = is_asked or self.states.is_due(state.global_step)
        control.should_training_stop = control.should_training_stop or is_asked


def train(
    model: PreTrainedModel,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    arguments: TrainingArguments,
    checkpoint: Path | None,
) -> int:
    """Run the `Trainer`; return the number of steps.

    Args:
        model: The model, changed in place.
        rows: What is trained on.
        collate: Makes a batch, labels included, of some of the rows, on the CPU.
        arguments: What `training_arguments` returned.
        checkpoint: What `prepare` returned.

    Raises:
        StageStopped: After a signal, once the state is saved.
        StorageError: If it could not be.
    """
    # The trainer writes it into the config that is saved; models that never cache have none.
    use_cache = vars(model.config).get("use_cache")
    states = States(Path(str(arguments.output_dir)))
    with stop_requests() as asked:
        trainer = SealedTrainer(
            states,
            model=model,
            args=arguments,
            train_dataset=cast("Any", rows),
            data_collator=cast("Any", collate),
            callbacks=[_Saving(states, asked)],
        )
        trainer.remove_callback(PrinterCallback)
        steps = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).global_step
    if asked.number and steps < trainer.state.max_steps:
        raise states.stopped(steps, asked.number)
    if use_cache is not None:
        model.config.use_cache = use_cache
    return steps
