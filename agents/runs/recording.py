"""The callbacks that write a run's metrics.jsonl and samples.jsonl, and show the warnings of other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from textenv.env import TextEnv

from ..distributed.collectives import from_main, gather
from ..distributed.sharding import gathered
from ..distributed.warned import warnings_of_others
from ..distributed.world import is_main_process
from ..evaluation.shared_episodes import run_together
from ..policies.lm_policy import LMPolicy
from ..steps.data_parallel import merge
from ..steps.step import tokens_of_rollout
from .folder import AGGREGATION, SAMPLE, RunFolder, read_rows

Row = dict[str, Any]


class RowWriter(KVWriter):
    """A writer of SB3's logger that collects the figures of one iteration in a row.

    SB3 `on_policy_algorithm.learn` dumps its logger after a rollout and before the update, so that the figures of an
    update come with those of the next rollout. Here the figures of an update go into the row of its own iteration.
    """

    def __init__(self) -> None:
        self.row: Row = {}
        self.in_rollout = False

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add the figures of a dump of the logger to the row."""
        for name, value in key_values.items():
            if self.in_rollout and name.startswith("train/"):  # the previous update's, whose row is already written
                continue
            if name == AGGREGATION or isinstance(value, (int, float, np.generic)):
                self.row[name] = value.item() if isinstance(value, np.generic) else value
        self.in_rollout = False

    def close(self) -> None:
        """Do nothing: the row is in memory."""


class Recorder(BaseCallback):
    """Writes a row of `metrics.jsonl` for each iteration, with its update and its evaluation.

    In the list of callbacks it comes after all callbacks that log at the start of a rollout, and before the one that
    saves checkpoints, so that the rows of all iterations before a checkpoint are on the disk.

    Args:
        run: The run's folder.
        writer: The writer of the model's logger.
        show: A function that is called with each row.
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
        cast("LMPolicy", self.model.policy).surrogate.record(self.model)  # of the last update, which no rollout follows
        # SB3 `ppo.PPO.train` has recorded the update's figures, which are dumped only after the next rollout.
        values = {name: value for name, value in self.logger.name_to_value.items() if name.startswith("train/")}
        self.writer.write(merge(gather("the figures of an update", values)), {})  # as `SharedLogger` merges the others
        if not is_main_process():
            self.writer.row = {}
            return
        if all(name.startswith("train/") for name in self.writer.row):  # an early stop: the row is written already
            return
        row = {"tokens": self.model.num_timesteps, **dict(sorted(self.writer.row.items()))}
        self.writer.row = {}
        self.run.append(self.run.metrics, [row])
        self.show(row)


class OtherWarnings(BaseCallback):
    """Shows, after each iteration, the warnings that other processes have given and this one has not.

    Args:
        say: A function that shows a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        for line in warnings_of_others():
            self.say(f"warning: {line}")

    def _on_training_end(self) -> None:
        self._on_rollout_start()


class SampleRecorder(BaseCallback):
    """Writes the policy's texts for a few prompts into `samples.jsonl`: at the start, regularly and at the end.

    It samples with its own generator and the same seed each time, and does not change training.

    Args:
        run: The run's folder.
        env: The environment, whose first prompts are continued.
        n: The number of prompts; 0 writes nothing.
        every: The number of rollouts between two sets of samples.
        show: A function that is called with each set.

    Raises:
        ValueError: If `every` is below 1.
    """

    def __init__(self, run: RunFolder, env: TextEnv, n: int, every: int, show: Callable[[Sequence[Row]], None]) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"Expected `samples_every` to be at least 1, got {every}.")
        self.run, self.env, self.n, self.every, self.show = run, env, n, every, show

    def _on_training_start(self) -> None:
        written = read_rows(self.run.samples, SAMPLE) if is_main_process() else []
        self.last_written = from_main("the last samples", max((row["tokens"] for row in written), default=-1))

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps // tokens_of_rollout(self.model) % self.every == 0:
            self._write()

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        now = self.model.num_timesteps
        if now <= self.last_written or self.n < 1:  # a resumed run has these samples already
            return
        self.last_written = now
        policy = cast("LMPolicy", self.model.policy)
        with gathered(policy.lm):  # a collective: each process then has whole weights
            steps = run_together(policy, self.env, self.env.prompts[: self.n])
        if not is_main_process():
            return
        rows = [{"tokens": now, **sample_row(step.info)} for step in steps]
        self.run.append(self.run.samples, rows)
        self.show(rows)


def sample_row(info: Mapping[str, Any]) -> Row:
    """Return the final info of an episode as a row: prompt, text, end reason, reward and its parts."""
    return {
        "prompt": str(info["prompt"]),
        "text": info["text"],
        "end_reason": str(info["end_reason"]),
        "reward": float(info["episode"]["r"]),
        "parts": {name: float(value) for name, value in info["reward_parts"].items()},
    }
