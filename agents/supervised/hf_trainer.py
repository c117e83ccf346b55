"""transformers' `Trainer` for SFT and classifiers, interruptible and resumable; it needs accelerate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..distributed.world import is_main_process, world
from ..signals import Interrupts
from ..small_models.progress import progress
from .resumable import States, first_request, stop_requests


def training_arguments(
    work: Path,
    n_epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress_bar: bool,
    is_mean_of_tokens: bool,
) -> TrainingArguments:
    """Return the arguments of the `Trainer`; it reports to no tracker.

    Args:
        work: The folder of the training states.
        n_epochs: The number of passes over the data; may be a fraction.
        batch_size: The number of rows in a minibatch, of all processes together.
        learning_rate: The peak of a cosine schedule that warms up over the first tenth.
        seed: The seed of dropout and the order of the data.
        progress_bar: Whether to show a progress bar.
        is_mean_of_tokens: Whether the loss is a mean over the labelled tokens of a minibatch, of which each process may
            have another number, and not over its rows.

    Raises:
        ValueError: If the number of processes does not divide the number of rows.
    """
    here = world()
    size = 1 if here is None else here.size
    if batch_size % size != 0:
        raise ValueError(f"Expected batch_size to divide by the {size} processes, got {batch_size}.")
    arguments = TrainingArguments(
        use_cpu=here is not None and not torch.cuda.is_available(),  # else accelerate overlooks processes without GPUs
        output_dir=str(work),
        num_train_epochs=n_epochs,
        per_device_train_batch_size=batch_size // size,
        learning_rate=learning_rate,
        seed=seed,
        disable_tqdm=not progress_bar or not is_main_process(),
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # transformers `TrainingArguments.get_warmup_steps`: below 1, a share of all steps
        weight_decay=0.01,
        save_strategy="no",  # `_Saving` decides when to save, and `States` how many states are kept
        logging_steps=20,
        report_to="none",
        # For a mean of tokens, the Trainer multiplies the loss by the number of processes: wrong for a mean of rows.
        average_tokens_across_devices=is_mean_of_tokens,
        remove_unused_columns=False,  # our rows are not dicts, and our own collators read them
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.world_size != size:  # each process would train alone
        raise RuntimeError(f"Expected transformers' Trainer to see {size} processes, got {arguments.world_size}.")
    return arguments


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch on leaving, since the `Trainer` seeds all of them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class SealedTrainer(Trainer):
    """A `Trainer` whose checkpoints get a manifest once they are complete; a failed one is tried again later.

    Args:
        states: The writer of the checkpoints.
        **kwargs: The arguments of `Trainer`.
    """

    def __init__(self, states: States, **kwargs: Any) -> None:
        self.states = states
        super().__init__(**kwargs)

    def _save_checkpoint(self, *args: Any) -> None:
        save = super()._save_checkpoint
        # transformers `Trainer._save_checkpoint` writes to output_dir/checkpoint-<step>, the same path as `folder`.
        self.states.save(self.state.global_step, lambda folder: save(*args))


class _Saving(TrainerCallback):
    """Tells the `Trainer` when to save, and to stop after the step in which a signal came."""

    def __init__(self, states: States, signals: Interrupts) -> None:
        self.states, self.signals, self.number = states, signals, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # transformers `Trainer` reads both flags after each step: first it saves, then it leaves its loop.
        self.number = first_request(self.signals)
        is_asked_to_stop = self.number != 0
        control.should_save = is_asked_to_stop or self.states.is_due(state.global_step)
        control.should_training_stop = control.should_training_stop or is_asked_to_stop


class _Progress(TrainerCallback):
    """Shows the steps made and the loss as every other training does, in place of the `Trainer`'s own bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        made = {"total": state.max_steps, "initial": state.global_step}
        self.bar = progress(description="training", unit="step", is_shown=not args.disable_tqdm, **made)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def train(
    model: PreTrainedModel,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    arguments: TrainingArguments,
    checkpoint: Path | None,
) -> int:
    """Run the `Trainer`, and return the number of steps.

    Args:
        model: The model, changed in place.
        rows: The training data.
        collate: A function from rows to a batch on the CPU, labels included.
        arguments: The arguments that `training_arguments` returned.
        checkpoint: The state to resume from, as `prepare` returned it; None starts anew.

    Raises:
        StageStopped: After a signal, once the state is saved.
        StorageError: After a signal, if the state could not be saved.
    """
    # transformers `Trainer.__init__` changes `use_cache` of the config, which is saved with the model: it is put back
    # below. The config of a model that never caches has no such key.
    use_cache = vars(model.config).get("use_cache")
    states = States(Path(str(arguments.output_dir)))
    with stop_requests() as signals:
        saving = _Saving(states, signals)
        trainer = SealedTrainer(
            states,
            model=model,
            args=arguments,
            train_dataset=cast("Any", rows),
            data_collator=cast("Any", collate),
            callbacks=[saving, _Progress()],
        )
        trainer.remove_callback(ProgressCallback)  # which draws into pipes, too
        trainer.remove_callback(PrinterCallback)  # which prints each log if there is no progress bar
        steps = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).global_step
    if saving.number and steps < trainer.state.max_steps:
        raise states.stopped(steps, saving.number)
    if use_cache is not None:
        model.config.use_cache = use_cache
    return steps
