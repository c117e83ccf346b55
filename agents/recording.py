"""What a run writes down while it trains: a row an iteration, and samples; a resumed run writes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from textenv.env import TextEnv

from .generation import run_episodes
from .policies import LMPolicy
from .run_folder import SAMPLE, RunFolder, read_rows

Row = dict[str, Any]


class RowWriter(KVWriter):
    """Keeps what is logged until the iteration is over.

    SB3 writes the figures of a rollout together with those of the update before it, and `Evaluate` writes in between;
    here each goes into the row of the iteration that it is of.
    """

    def __init__(self) -> None:
        self.row: Row = {}
        self.in_rollout = False

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Take in what was logged."""
        for name, value in key_values.items():
            if self.in_rollout and name.startswith("train/"):  # of the update before: already written
                continue
            if isinstance(value, (int, float, np.generic)):
                self.row[name] = value.item() if isinstance(value, np.generic) else value
        self.in_rollout = False

    def close(self) -> None:
        """There is nothing to close."""


class Recorder(BaseCallback):
    """Writes a row into `metrics.jsonl` for each iteration, its update and evaluation included.

    It comes behind all that log when a rollout starts, and before what saves checkpoints: the rows of what a
    checkpoint has behind it are on the disk.

    Args:
        run: The run's folder.
        writer: The writer that the model's logger has.
        show: What is called with each row.
    """

    def __init__(self, run: RunFolder, writer: RowWriter, show: Callable[[Row], None]) -> None:
        super().__init__()
        self.run, self.writer, self.show = run, writer, show

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._write()
        self.writer.in_rollout = True

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        values = {name: value for name, value in self.logger.name_to_value.items() if name.startswith("train/")}
        self.writer.write(values, {})
        if all(name.startswith("train/") for name in self.writer.row):  # an early stop: the update's row is written
            return
        row = {"tokens": self.model.num_timesteps, **dict(sorted(self.writer.row.items()))}
        self.writer.row = {}
        self.run.append(self.run.metrics, [row])
        self.show(row)


class SampleRecorder(BaseCallback):
    """Writes what the policy makes of a few prompts into `samples.jsonl`: at the start, every so often and at the end.

    It draws from a generator of its own, with the same seed every time, and does not change training.

    Args:
        run: The run's folder.
        env: The environment whose first prompts are continued.
        n: How many of them.
        every: Rollouts from one time to the next.
        show: What is called with the rows of each time.
    """

    def __init__(self, run: RunFolder, env: TextEnv, n: int, every: int, show: Callable[[Sequence[Row]], None]) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"Expected `samples_every` to be at least 1, got {every}.")
        self.run, self.env, self.n, self.every, self.show = run, env, n, every, show

    def _on_training_start(self) -> None:
        self.tokens = max((row["tokens"] for row in read_rows(self.run.samples, SAMPLE)), default=-1)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        model = self.model
        size = model.n_steps * model.n_envs  # type: ignore[attr-defined]
        if model.num_timesteps // size % self.every == 0:
            self._write()

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        now = self.model.num_timesteps
        if now <= self.tokens or self.n < 1:
            return
        self.tokens = now
        policy = cast("LMPolicy", self.model.policy)
        steps = run_episodes(policy, self.env, self.env.prompts[: self.n])
        rows = [{"tokens": now, **sample_row(step.info)} for step in steps]
        self.run.append(self.run.samples, rows)
        self.show(rows)


def sample_row(info: Mapping[str, Any]) -> Row:
    """Return a finished episode as a row: prompt, text, end reason, reward and its parts."""
    return {
        "prompt": str(info["prompt"]),
        "text": info["text"],
        "end_reason": str(info["end_reason"]),
        "reward": float(info["episode"]["r"]),
        "parts": {name: float(value) for name, value in info["reward_parts"].items()},
    }
