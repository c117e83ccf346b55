"""How transformers' `Trainer` runs training on labels, stops at Ctrl-C and goes on; needs accelerate to be imported."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

SAVE_STEPS = 500  # how often the state is written, against a process that is killed


def training_arguments(**given: Any) -> TrainingArguments:
    """Return what the `Trainer` is told, without reports to anyone."""
    return TrainingArguments(
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_steps=20,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **given,
    )


class _StopOnInterrupt(TrainerCallback):
    """Stops behind the step in which Ctrl-C came, having saved the state; a second Ctrl-C stops at once."""

    was_interrupted = False

    def __call__(self, *args: Any) -> None:
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.was_interrupted:
            control.should_save = control.should_training_stop = True


def train(
    model: PreTrainedModel,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    arguments: TrainingArguments,
    checkpoint: str | None,
) -> int:
    """Run the `Trainer`; return the number of steps.

    Args:
        model: The model, changed in place.
        rows: What is trained on.
        collate: Makes a batch, labels included, of some of the rows, on the CPU.
        arguments: What `training_arguments` returned.
        checkpoint: What `prepare` returned.

    Raises:
        KeyboardInterrupt: Once the state is saved.
    """
    stop = _StopOnInterrupt()
    # The trainer writes it into the config that is saved; models that never cache have none.
    use_cache = vars(model.config).get("use_cache")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=cast("Any", rows),
        data_collator=cast("Any", collate),
        callbacks=[stop],
    )
    trainer.remove_callback(PrinterCallback)
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    previous = signal.signal(signal.SIGINT, stop) if is_main else None
    try:
        steps = trainer.train(resume_from_checkpoint=checkpoint).global_step
    finally:
        if is_main:
            signal.signal(signal.SIGINT, previous)
    if stop.was_interrupted and steps < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped after step {steps}; `resume=True` goes on from there")
    if use_cache is not None:
        model.config.use_cache = use_cache
    return steps


def prepare(work: Path, fingerprint: str, resume: bool) -> str | None:
    """Return the checkpoint to go on from, if there is one; else empty the folder for the state."""
    mark = work / "fingerprint"
    checkpoint = get_last_checkpoint(str(work)) if resume and mark.is_file() else None
    if checkpoint is not None:
        if mark.read_text() != fingerprint:
            raise ValueError(
                f"Expected the arguments and data of the interrupted run in {work}, got others: repeat them, or start "
                "anew with resume=False."
            )
        return checkpoint
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    mark.write_text(fingerprint)
    return None
