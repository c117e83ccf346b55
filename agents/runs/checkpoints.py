"""The checkpoints of a run: their writing between iterations, also after a full disk, and the choice of one to load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from ..checkpoints.checkpoint import is_between_iterations, save_step
from ..checkpoints.manifest import newest_intact
from ..checkpoints.storage import explain
from ..distributed.collectives import ProcessStopped, from_main, gather
from ..errors import CommandError, Interrupted, NumericsError, StorageError, is_full
from ..signals import Interrupts
from ..steps.step import tokens_of_rollout
from .folder import RunFolder

BYTES_A_WEIGHT = 12  # a trained weight and its two moments of AdamW, 4 bytes each in float32


class RunCheckpoints(BaseCallback):
    """Saves the run every `every` rollouts, at the end, and after a request to stop.

    If a checkpoint cannot be written, older ones stay intact, training continues, and the next iteration tries again.
    Rows of figures that wait for room on the disk are tried again, too, and before the checkpoint: it must never be
    ahead of the rows.

    Args:
        run: The run's folder.
        every: The number of rollouts from one checkpoint to the next.
        keep: How many of the newest checkpoints stay.
        interrupts: The requests to stop.
        is_over: A function that is called when a rollout starts, and returns whether its first step will end training.
        say: A function that shows a line.

    Raises:
        Interrupted: After a signal, once the iteration is finished and saved.
        StorageError: At the end, if the last checkpoint or the last rows could not be written.
        NumericsError: If weights are not finite.
    """

    def __init__(
        self,
        run: RunFolder,
        every: int,
        keep: int,
        interrupts: Interrupts,
        is_over: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        if every < 1 or keep < 1:
            raise ValueError(f"Expected checkpoint_every and keep_checkpoints to be 1 or more, got {every}, {keep}.")
        self.run, self.every, self.keep = run, every, keep
        self.interrupts, self.is_over, self.say = interrupts, is_over, say
        self.failure: str | None = None
        self.rows_failure: str | None = None
        self.are_waiting = False

    def _on_training_start(self) -> None:
        self.saved = self.model.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._write_rows()
        now, number = self.model.num_timesteps, max(gather("requests to stop", self.interrupts.number))
        # `now` is a multiple of the rollout's size here. After a failure a checkpoint is due at every rollout.
        is_due = now // tokens_of_rollout(self.model) % self.every == 0 or self.failure is not None
        if now > self.saved and (is_due or number or self.is_over()):
            self._save()
        if number:
            self._check()
            saved = ", saved" if self.run.has_checkpoint() else ""
            raise Interrupted(f"stopped after {now:,} tokens{saved}; {self.run.how_to_go_on()}", number)

    def _on_training_end(self) -> None:
        self._write_rows()
        if is_between_iterations(cast("OnPolicyAlgorithm", self.model)):
            self._save()
        self._check()  # an early stop comes in the first step of a rollout, whose start has already saved the run

    def _check(self) -> None:
        """Raise StorageError if rows or a checkpoint are still not written."""
        failure = self.rows_failure if self.are_waiting else self.failure
        if failure is not None:
            raise StorageError(failure)

    def _write_rows(self) -> None:
        try:
            self.run.write_waiting()
        except OSError as error:
            if not is_full(error):
                raise
            self.rows_failure = f"Rows could not be written, and wait: {explain(error, self.run.path)}"
            self.say(self.rows_failure)
        # Of several processes, rank 0 writes.
        self.are_waiting, self.rows_failure = from_main("rows", (bool(self.run.waiting), self.rows_failure))

    def _save(self) -> None:
        if self.are_waiting:  # the rows of the tokens that the checkpoint counts must be on the disk first
            self.failure = self.rows_failure
            return
        failure = None
        try:
            save_step(cast("OnPolicyAlgorithm", self.model), self.run.checkpoints, self.keep)
        except FloatingPointError as error:
            raise NumericsError(str(error)) from error
        except (OSError, ProcessStopped) as error:
            if isinstance(error, ProcessStopped) and not error.is_of_files:
                raise
            failure = f"The checkpoint could not be written: {explain(error, self.run.path, needed(self.model))}"
        self.failure = from_main("a checkpoint that failed", failure)
        if self.failure is None:
            self.saved = self.model.num_timesteps
        else:
            self.say(self.failure)


def needed(model: object) -> int:
    """Return the approximate size of a model's checkpoint, in bytes."""
    policy = cast("OnPolicyAlgorithm", model).policy
    # Frozen weights, 4 bytes each, have no moments.
    return sum(weight.numel() * (BYTES_A_WEIGHT if weight.requires_grad else 4) for weight in policy.parameters())


def checkpoint_to_load(run: RunFolder, say: Callable[[str], None] | None = None) -> Path | None:
    """Return the newest intact checkpoint of a run; None if none was ever written.

    Args:
        run: The run's folder.
        say: A function that shows a line for each damaged newer checkpoint; if it is None, damage is an error.

    Raises:
        CommandError: If the newest checkpoint is damaged and `say` is None, or if all of them are damaged.
    """
    checkpoint, damage = newest_intact(run.checkpoints)
    # A checkpoint's name is "step_" and 12 digits.
    newest = "no checkpoint is intact" if checkpoint is None else f"newest intact: step {int(checkpoint.name[5:])}"
    if damage and (say is None or checkpoint is None):
        raise CommandError(f"{damage[0].rstrip('.')}; {newest}.")
    for message in damage:
        if say is not None:
            say(f"{message.rstrip('.')}; {newest}, continuing from there.")
    return checkpoint
