"""What one wants to see while a model trains: figures by documented keys, samples, curves; and checkpoints."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat

from textenv.episode import EndReason
from textenv.printable import page_text, printable
from textenv.prompts import PromptLike
from textenv.rewarding import FAILURE
from textenv.tokenizer import Tokenizer

from .checkpoint import is_between_iterations, save_step
from .curves import CURVES, check_matplotlib, check_picture, draw_curves
from .data_parallel import merge
from .distributed import gather, is_main_process
from .generation import Generation, generate
from .policies import LMPolicy
from .reward_share import RewardShare
from .rollout_steps import remember
from .scored import ScoredEpisodes
from .sharding import gathered
from .vec_env import TextVecEnv


class EpisodeMetrics(BaseCallback):
    """Logs, for each rollout, the means over the episodes that ended in it (or, scored later, got their score in it).

    Keys: `reward/task` and `reward/<part>` (the task reward and its named parts), `episode/length` (tokens),
    `episode/end_<reason>` (the share of each end reason), `time/tokens_per_second` (since the last rollout's end, the
    update included), `time/reward_share` (which share of that time the reward took; with a `TextVecEnv`). Where the
    reward fails: `episode/dropped`, the number of episodes that it left out, which no other figure has, and
    `episode/failed`, of those with a penalty in place of a score (the part "failure"); both are logged from the first
    one on. The README's table says what every key means.

    Example:
        >>> from agents import EpisodeMetrics
        >>> callback = EpisodeMetrics()  # model.learn(100_000, callback=callback)
    """

    def __init__(self) -> None:
        super().__init__()
        self._has_failed = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"has_failed": self._has_failed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._has_failed = state["has_failed"]

    def _on_training_start(self) -> None:
        self._episodes = ScoredEpisodes(self.training_env)
        self._clock = time.perf_counter()
        self._timesteps = self.model.num_timesteps
        remember(self.model, self)
        env = self.training_env.unwrapped
        self._rewards = RewardShare(env.lanes) if isinstance(env, TextVecEnv) else None

    def _on_step(self) -> bool:
        self._episodes.see(self.locals["infos"])
        return True

    def _on_rollout_end(self) -> None:
        infos = self._episodes.take()
        now = time.perf_counter()
        speed = (self.model.num_timesteps - self._timesteps) / (now - self._clock)
        self._clock, self._timesteps = now, self.model.num_timesteps
        self.logger.record("time/tokens_per_second", speed)
        if self._rewards is not None:
            self.logger.record("time/reward_share", self._rewards.share)
            self._rewards = RewardShare(self._rewards.lanes)
        n_dropped = sum(info["dropped"] for info in infos)
        n_failed = sum(any(name.split("/")[-1] == FAILURE for name in info["reward_parts"]) for info in infos)
        self._has_failed = self._has_failed or n_dropped + n_failed > 0
        if self._has_failed:
            self.logger.record("episode/dropped", n_dropped)
            self.logger.record("episode/failed", n_failed)
        infos = [info for info in infos if not info["dropped"]]
        if not infos:
            return
        self.logger.record("reward/task", float(np.mean([info["episode"]["r"] for info in infos])))
        self.logger.record("episode/length", float(np.mean([info["episode"]["l"] for info in infos])))
        parts: dict[str, float] = defaultdict(float)
        for info in infos:
            for name, value in info["reward_parts"].items():
                parts[name] += value / len(infos)
        for name, value in parts.items():
            self.logger.record(f"reward/{name}", value)
        ends = Counter(info["end_reason"] for info in infos)
        for reason in EndReason:
            self.logger.record(f"episode/end_{reason}", ends[reason] / len(infos))


class SampleTable(BaseCallback):
    """Shows what the policy writes: before training, every so many rollouts, and at the end.

    On the console and, where TensorBoard logs, as text under `samples`. It draws from a generator of its own and does
    not change training.

    Args:
        prompts: What to continue, once each.
        tokenizer: The tokenizer that the model trains with.
        every: Rollouts from one table to the next.
        max_new_tokens: The most tokens of a sample; unset, as in `generate`: as many as in training.
        seed: The seed of the sampling: the same for every table, so that they can be compared.
        console: Where to print; rich's default console.
        **env_kwargs: Other arguments of `generate`: the env's `mask`, `stop_ids`, `stop_strings`, ...
    """

    def __init__(
        self,
        prompts: Sequence[PromptLike],
        tokenizer: Tokenizer,
        every: int = 10,
        max_new_tokens: int | None = None,
        seed: int = 0,
        console: Console | None = None,
        **env_kwargs: Any,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"Expected `every` to be at least 1, got {every}.")
        self.prompts, self.tokenizer, self.every = prompts, tokenizer, every
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, **env_kwargs}
        self.console = console or Console()
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._rollouts % self.every == 0:
            self._show()
        self._rollouts += 1

    def _on_training_end(self) -> None:
        self._show()

    def _show(self) -> None:
        with gathered(cast("LMPolicy", self.model.policy).lm):
            if is_main_process():
                self._print()

    def _print(self) -> None:
        samples = generate(self.model, self.prompts, self.tokenizer, **self.options)
        title = f"samples after {self.model.num_timesteps} tokens"
        self.console.print(sample_table({title: samples}))
        page = "\n\n".join(f"**{page_text(sample.prompt)}**{page_text(sample.text)}" for sample in samples)
        # Not by `logger.record`: the next dump has a later step, and after training there is none.
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                output.writer.add_text("samples", page, self.model.num_timesteps)
                output.writer.flush()  # after training nothing else would


def sample_table(columns: dict[str, Sequence[Generation]]) -> Table:
    """Return samples as a table: a row a prompt, a column for each title, prompt and text told apart.

    Control characters and markup in what a model wrote are shown, not obeyed.
    """
    table = Table(show_lines=True)
    for title in columns:
        table.add_column(title, ratio=1)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text.assemble((printable(sample.prompt), "dim"), printable(sample.text)) for sample in row))
    return table


class RewardCurves(BaseCallback):
    """Draws the reward, the divergence from the reference and the length over training, as a PNG at the end.

    Needs matplotlib: `pip install "textenv[plot]"`. Needs `EpisodeMetrics` before it in the list of callbacks; the
    divergence is drawn where a `KLPenalty` logs it.

    Args:
        path: The picture's file.
        title: What stands above it.
    """

    def __init__(self, path: str | os.PathLike[str], title: str = "") -> None:
        super().__init__()
        self.path, self.title = Path(path), title
        self.history: list[dict[str, float]] = []

    def _on_training_start(self) -> None:
        check_matplotlib()
        check_picture(self.path)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        values = merge(gather("figures", dict(self.logger.name_to_value)))
        row = {key: float(values.get(key, math.nan)) for key, _ in CURVES}
        self.history.append({"tokens": self.model.num_timesteps, **row})

    def _on_training_end(self) -> None:
        if is_main_process():
            draw_curves(self.path, {"": self.history}, self.title)


class Checkpoints(BaseCallback):
    """Saves the whole run between iterations, as `step_<timesteps>` in a folder, and when training ends.

    Resume with `load_checkpoint(model, latest_checkpoint(folder))` and `learn(rest, reset_num_timesteps=False)`.

    Args:
        folder: Where the checkpoints go.
        every: Rollouts from one to the next.
        keep: How many of the newest stay.
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
            warnings.warn("Training was stopped inside a rollout: the last checkpoint is that of before.", stacklevel=2)

    def _save(self) -> None:
        save_step(self.model, self.folder, self.keep)  # type: ignore[arg-type]
