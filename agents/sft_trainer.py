"""How transformers' `Trainer` runs training on labels, stops at Ctrl-C and goes on; needs accelerate to be imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .interrupted import SAVE_STEPS, CtrlC, claim_folder, interrupted_at


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
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_steps=20,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _StopOnInterrupt(TrainerCallback):
    """Stops behind the step in which Ctrl-C came, having saved the state."""

    def __init__(self, ctrl_c: CtrlC) -> None:
        self.ctrl_c = ctrl_c

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ctrl_c.pressed:
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
    # The trainer writes it into the config that is saved; models that never cache have none.
    use_cache = vars(model.config).get("use_cache")
    with CtrlC() as ctrl_c:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=cast("Any", rows),
            data_collator=cast("Any", collate),
            callbacks=[_StopOnInterrupt(ctrl_c)],
        )
        trainer.remove_callback(PrinterCallback)
        steps = trainer.train(resume_from_checkpoint=checkpoint).global_step
    if ctrl_c.pressed and steps < trainer.state.max_steps:
        raise interrupted_at(steps)
    if use_cache is not None:
        model.config.use_cache = use_cache
    return steps


def prepare(work: Path, arguments: object, resume: bool) -> str | None:
    """Return the checkpoint to go on from, if there is one; else empty the folder for the state."""
    checkpoint = get_last_checkpoint(str(work)) if resume and work.is_dir() else None
    claim_folder(work, arguments, has_state=checkpoint is not None)
    return checkpoint
