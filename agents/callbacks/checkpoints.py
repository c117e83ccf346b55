"""The callback that writes checkpoints of a whole run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from ..checkpoints.checkpoint import is_between_iterations, save_step


class Checkpoints(BaseCallback):
    """Saves the whole run in a folder, as `step_<timesteps>`, every `every` rollouts and when training ends.

    Resume with `load_checkpoint(model, latest_checkpoint(folder))` and `learn(rest, reset_num_timesteps=False)`.

    Args:
        folder: The folder of the checkpoints.
        every: The number of rollouts from one checkpoint to the next.
        keep: The number of newest checkpoints to keep.

    Raises:
        ValueError: If `every` or `keep` is below 1.

    Example:
        >>> from agents import Checkpoints
        >>> # model.learn(100_000, callback=Checkpoints("run", every=5))
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 10, keep: int = 3) -> None:
        super().__init__()
        if every < 1 or keep < 1:
            raise ValueError(f"Expected `every` and `keep` to be at least 1, got {every} and {keep}.")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._rollouts > 0 and self._rollouts % self.every == 0:
            self._save()
        self._rollouts += 1

    def _on_training_end(self) -> None:
        if is_between_iterations(self.model):  # type: ignore[arg-type]
            self._save()
        else:
            # A callback returned False in a step, so that the rollout is incomplete: a checkpoint cannot hold it.
            warnings.warn(
                "Training was stopped inside a rollout: the last checkpoint is the one before it.", stacklevel=2
            )

    def _save(self) -> None:
        save_step(self.model, self.folder, self.keep)  # type: ignore[arg-type]
