"""Evaluation while a model trains: figures in the log, the best model kept, and an early stop."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import NoneType
from typing import Any, cast

from stable_baselines3.common.callbacks import BaseCallback
from transformers import PreTrainedTokenizerBase

from textenv.json_files import read_json
from textenv.metrics.scores import Metric
from textenv.prompts import PromptLike
from textenv.tokenizer import Tokenizer

from .actor_critic import LMActorCritic
from .distributed import from_main, once
from .evaluation import Evaluation, evaluate
from .exporting import export
from .files import restore_folder, write_text
from .kl import KLPenalty
from .output_folders import check_output, output_folder
from .policies import LMPolicy
from .refusal import is_full
from .shard_files import replaced_together
from .sharding import gathered
from .storage import explain
from .world import is_main_process, world

BEST = {"figure": str, "value": float, "num_timesteps": int}
HISTORY = [{"num_timesteps": int, "figures": {str: (float, None)}}]


class Evaluate(BaseCallback):
    """Evaluates between iterations: before training, every so many tokens and at the end; does not change training.

    It logs `eval/<figure>` for every figure of `evaluate`, at the number of tokens trained on. Every evaluation has the
    same seed, so that they can be compared. With a folder it writes there

    - `history.json`: the figures of every evaluation,
    - `best/model`: the best model so far, as `export` writes it, for `AutoModelForCausalLM.from_pretrained`,
    - `best/evaluation.json` and `.md`: its figures and texts, and `best/best.json`: its figure and when it was.

    They appear together or not at all. A run that goes on from a checkpoint reads them, and goes on as if it had never
    stopped: the best is replaced by a better one only, and evaluations made after the checkpoint are made again.

    An early stop takes effect in the first step of the next rollout, so the model stays as it was evaluated.

    Args:
        prompts: What to continue: keep it apart from what is trained on.
        tokenizer: The tokenizer that the model trains with; a Hugging Face one is written beside the best model.
        metrics: As for `evaluate`.
        every: Tokens from one evaluation to the next, rounded up to whole rollouts.
        folder: Where history and best model go; None keeps neither.
        best: The figure by which models are compared.
        higher_is_better: Whether a larger figure is a better one; False for a perplexity.
        patience: Stop after so many evaluations in a row without a better figure; None never stops.
        **kwargs: Other arguments of `evaluate`: `reward`, `n`, `max_new_tokens`, `references_column`, `reference`, ...

    Raises:
        ValueError: If there is no such figure, or a new run finds the best model of another in its folder.

    Example:
        >>> from agents import Evaluate
        >>> # model.learn(100_000, callback=Evaluate(rows, tokenizer, folder="run", reward=reward, patience=5))
    """

    def __init__(
        self,
        prompts: Sequence[PromptLike],
        tokenizer: Tokenizer,
        metrics: Sequence[Metric] = (),
        *,
        every: int = 10_000,
        folder: str | os.PathLike[str] | None = None,
        best: str = "reward",
        higher_is_better: bool = True,
        patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if every < 1 or (patience is not None and patience < 1):
            raise ValueError(f"Expected `every` and `patience` to be at least 1, got {every} and {patience}.")
        self.prompts, self.tokenizer, self.metrics, self.kwargs = prompts, tokenizer, metrics, kwargs
        self.every, self.patience = every, patience
        self.folder = None if folder is None else Path(folder)
        self.best, self.sign = best, 1 if higher_is_better else -1
        self.history: dict[int, dict[str, float]] = {}  # figures by number of tokens
        self.best_value, self.best_at = -self.sign * math.inf, 0

    def _on_training_start(self) -> None:
        now, self._n_updates = self.model.num_timesteps, -1
        if now == 0:
            self.history, self.best_value, self.best_at = {}, -self.sign * math.inf, 0
        if self.folder is not None and is_main_process():
            self._go_on(self.folder, now)
        self._agree()
        # What comes after the checkpoint is measured again.
        self.history = {at: figures for at, figures in self.history.items() if at <= now}

    def _go_on(self, folder: Path, now: int) -> None:
        """Take up what an earlier part of the run has written."""
        check_output(folder / "best", "best model", overwrite=True)
        best, history = folder / "best" / "best.json", folder / "history.json"
        restore_folder(folder / "best")
        if now == 0 and best.is_file():
            raise ValueError(
                f"Expected a folder without the best model of another run, got {folder}: give another one, or load a "
                "checkpoint and learn(reset_num_timesteps=False) to go on with that run."
            )
        if best.is_file():
            kept = read_json(best, BEST)
            if kept["figure"] != self.best:
                raise ValueError(f"Expected best={kept['figure']!r}, as in {folder}, got {self.best!r}.")
            self.best_value, self.best_at = kept["value"], kept["num_timesteps"]
        if now > 0 and history.is_file():  # the best model is written first, so that a killed run measures it again
            self.history = {row["num_timesteps"]: _numbers(row["figures"]) for row in read_json(history, HISTORY)}
            if not best.is_file():
                self._remember_best(folder / "best", now)

    def _remember_best(self, lost: Path, now: int) -> None:
        """Go on by the figures where somebody has removed the best model: patience counts from it all the same."""
        for at, figures in self.history.items():
            if at <= now and self.sign * figures.get(self.best, math.nan) > self.sign * self.best_value:
                self.best_value, self.best_at = figures[self.best], at
        if math.isfinite(self.best_value):
            warnings.warn(
                f"{lost} is gone: the best model, of {self.best_at:,} tokens, is lost; a better one is kept again.",
                stacklevel=2,
            )

    def _agree(self) -> None:
        """Let all processes know what rank 0 has measured, so that they stop together."""
        known = self.history, self.best_value, self.best_at
        self.history, self.best_value, self.best_at = from_main("an evaluation", known)

    def _on_rollout_start(self) -> None:
        if not self.history or self.model.num_timesteps >= max(self.history) + self.every:
            self._evaluate()

    @property
    def is_over(self) -> bool:
        """Whether so many evaluations as `patience` says were no better."""
        return self.patience is not None and sum(at > self.best_at for at in self.history) >= self.patience

    def _on_step(self) -> bool:
        return not self.is_over

    def _on_training_end(self) -> None:
        if self._n_updates != self.model._n_updates:
            self._evaluate(is_last=True)

    def _evaluate(self, is_last: bool = False) -> None:
        now, self._n_updates = self.model.num_timesteps, self.model._n_updates
        with ExitStack() as readable:
            for lm in self._read:
                readable.enter_context(gathered(lm))
            best, result = (self.best_value, self.best_at), self._measure(now) if is_main_process() else None
            self._agree()
        try:
            if self.folder is not None and self.best_value != best[0]:
                self._keep(self.folder / "best", result)
            best = self.best_value, self.best_at
            if self.folder is not None and is_main_process():
                self._write_history(self.folder)
        except OSError as error:
            if is_last or not is_full(error) or world() is not None:
                raise
            del self.history[now]
            self.best_value, self.best_at = best
            warnings.warn(
                f"The evaluation at {now:,} tokens could not be kept: {explain(error, self.folder or '.')} It is made "
                "again after the next iteration.",
                stacklevel=2,
            )
        self.logger.dump(now)

    @property
    def _read(self) -> list[LMActorCritic]:
        """What an evaluation reads.

        Raises:
            ValueError: If it would build a reference, in one process, where weights are sharded.
        """
        policy, reference = cast("LMPolicy", self.model.policy).lm, self.kwargs.get("reference")
        if isinstance(reference, KLPenalty):
            reference = reference.reference
        if policy.shards is not None and not isinstance(reference, (LMActorCritic, NoneType)):
            raise ValueError(
                "Expected a KLPenalty, or another policy's `lm`, as `reference` with sharded weights, got "
                f"{reference!r:.80}: one process evaluates, and what it builds could not be sharded."
            )
        return [policy, reference] if isinstance(reference, LMActorCritic) else [policy]

    def _measure(self, now: int) -> Evaluation:
        result = evaluate(self.model, self.prompts, self.tokenizer, self.metrics, **self.kwargs)
        if self.best not in result.figures:
            raise ValueError(f"Expected `best` to be one of {list(result.figures)}, got {self.best!r}.")
        self.history[now] = {name: one.value for name, one in result.figures.items()}
        value = self.history[now][self.best]
        if self.sign * value > self.sign * self.best_value:
            self.best_value, self.best_at = value, now
        for name, number in self.history[now].items():
            self.logger.record(f"eval/{name}", number)
        return result

    def _keep(self, folder: Path, result: Evaluation | None) -> None:
        """Write the model and what was measured; all processes do, and rank 0 has what was measured."""
        with replaced_together(output_folder(folder, "best model", overwrite=True)) as beside:
            tokenizer = self.tokenizer if isinstance(self.tokenizer, PreTrainedTokenizerBase) else None
            export(self.model, tokenizer, beside / "model")
            once(lambda: self._write_best(beside, result))

    def _write_best(self, folder: Path, result: Evaluation | None) -> None:
        assert result is not None, "rank 0 has measured"
        result.save(folder / "evaluation")
        best = {"figure": self.best, "value": self.best_value, "num_timesteps": self.best_at}
        (folder / "best.json").write_text(json.dumps(best) + "\n", encoding="utf-8")

    def _write_history(self, folder: Path) -> None:
        rows = [
            {"num_timesteps": at, "figures": {name: v if math.isfinite(v) else None for name, v in figures.items()}}
            for at, figures in self.history.items()
        ]
        write_text(folder / "history.json", json.dumps(rows, indent=1) + "\n")


def _numbers(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in figures.items()}
