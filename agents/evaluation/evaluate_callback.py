"""The callback that evaluates a model while it trains: it logs figures, keeps the best model, and may stop early."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import NoneType
from typing import Any, cast

from stable_baselines3.common.callbacks import BaseCallback
from transformers import PreTrainedTokenizerBase

from textenv.checks.json_files import read_json
from textenv.metrics.scores import Metric
from textenv.prompts.prompts import PromptLike
from textenv.text.tokenizer import Tokenizer

from ..checkpoints.hf_export import export
from ..checkpoints.output_folders import check_output, output_folder
from ..checkpoints.shard_files import replaced_together
from ..checkpoints.storage import explain
from ..distributed.collectives import from_main, once
from ..distributed.sharding import gathered
from ..distributed.world import is_main_process, world
from ..errors import is_full
from ..files import restore_folder, write_text
from ..policies.actor_critic import LMActorCritic
from ..policies.lm_policy import LMPolicy
from ..steps.kl_penalty import KLPenalty
from .evaluation import Evaluation, evaluate_together
from .evaluation_files import BEST, HISTORY
from .judge_gap import judge_gap
from .prompt_scores import SCORES_FILE, Scored, scores_in, write_scores
from .tables import finite


class Evaluate(BaseCallback):
    """Evaluates before training, every `every` tokens between iterations, and at the end; does not change training.

    It logs `eval/<figure>` for every figure of `evaluate`, at the number of tokens trained on, and the seconds that it
    took as `time/evaluation_seconds`. All evaluations have the same seed, so that they can be compared. Of several
    processes each writes a share of the texts, and rank 0 measures them. With a judge it also logs `eval/gap`: how far
    the reward has risen ahead of the judge since the first evaluation, in standard deviations (see `judge_gap`). If
    it has a folder, it writes there

    - `history.json`: the figures of every evaluation,
    - `scores.json`: the scores of each prompt in the first and in the newest evaluation, for intervals over seeds,
    - `best/model`: the best model so far, as `export` writes it, for `AutoModelForCausalLM.from_pretrained`,
    - `best/evaluation.json` and `.md`: its figures and texts,
    - `best/best.json`: the name and value of the figure that made it the best, and its number of tokens.

    The folder `best` is replaced whole or not at all. A run that is resumed from a checkpoint reads these files and
    continues as if it had never stopped: it repeats evaluations made after the checkpoint, and replaces the best model
    only by a better one.

    An early stop takes effect at the first step of the next rollout, before any update: the final model is the model
    that was evaluated last.

    Args:
        prompts: The prompts to continue; keep them apart from the prompts of training.
        tokenizer: The tokenizer that the model trains with; a Hugging Face one is written beside the best model.
        metrics: The metrics, as for `evaluate`.
        every: The number of tokens from one evaluation to the next, rounded up to whole rollouts.
        folder: The folder of the history and the best model; None keeps neither.
        best: The name of the figure by which models are compared; by default `judge` if there is a judge, else
            `reward`: where the judge falls while the reward rises, the best model and `patience` follow the judge.
        higher_is_better: Whether a larger figure is better; False for a perplexity.
        patience: The number of evaluations in a row without a better figure after which training stops; None never
            stops.
        **kwargs: Other arguments of `evaluate`: `reward`, `n`, `max_new_tokens`, `references_column`, `reference`, ...

    Raises:
        ValueError: If `every` or `patience` is below 1; in training, if `evaluate` returns no figure named `best`, or
            a new run finds the best model of another run in its folder.

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
        best: str | None = None,
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
        self.best = best or ("reward" if kwargs.get("judge") is None else "judge")
        self.sign = 1 if higher_is_better else -1
        self.history: dict[int, dict[str, float]] = {}  # the figures, by the number of tokens trained on
        self.measured: dict[int, Scored] = {}  # the first and the newest evaluation, with the scores of each prompt
        self.best_value, self.best_at = -self.sign * math.inf, 0

    def _on_training_start(self) -> None:
        now, self._n_updates = self.model.num_timesteps, -1
        if now == 0:  # a new run, perhaps with a callback that another run has used
            self.history, self.measured, self.best_value, self.best_at = {}, {}, -self.sign * math.inf, 0
        if self.folder is not None and is_main_process():
            self._resume(self.folder, now)
        self._share_results()
        # A resumed run repeats the evaluations that were made after its checkpoint.
        self.history = {at: figures for at, figures in self.history.items() if at <= now}

    def _resume(self, folder: Path, now: int) -> None:
        """Read the history and the best figure that the run wrote before it was stopped."""
        check_output(folder / "best", "best model", overwrite=True)
        best, history = folder / "best" / "best.json", folder / "history.json"
        restore_folder(folder / "best")
        if now == 0 and best.is_file():
            raise ValueError(
                f"Expected a folder without the best model of another run, got {folder}: give another one, or load a "
                "checkpoint and learn(reset_num_timesteps=False) to continue with that run."
            )
        if best.is_file():
            kept = read_json(best, BEST)
            if kept["figure"] != self.best:
                raise ValueError(f"Expected best={kept['figure']!r}, as in {folder}, got {self.best!r}.")
            self.best_value, self.best_at = kept["value"], kept["num_timesteps"]
        # The history is written after the best model: a run that was killed between the two evaluates again.
        if now > 0 and history.is_file():
            self.history = {row["num_timesteps"]: _numbers(row["figures"]) for row in read_json(history, HISTORY)}
            self.measured = {at: scored for at, scored in scores_in(folder).items() if at <= now}
            if not best.is_file():
                self._remember_best(folder / "best", now)

    def _remember_best(self, lost: Path, now: int) -> None:
        """Take the best figure from the history, since somebody removed the best model: `patience` counts from it."""
        for at, figures in self.history.items():
            if at <= now and self.sign * figures.get(self.best, math.nan) > self.sign * self.best_value:
                self.best_value, self.best_at = figures[self.best], at
        if math.isfinite(self.best_value):
            warnings.warn(
                f"{lost} is gone: the best model, of {self.best_at:,} tokens, is lost; a better one is kept again.",
                stacklevel=2,
            )

    def _share_results(self) -> None:
        """Send the results of rank 0 to all processes, so that they stop together."""
        known = self.history, self.best_value, self.best_at
        self.history, self.best_value, self.best_at = from_main("an evaluation", known)

    def _on_rollout_start(self) -> None:
        if not self.history or self.model.num_timesteps >= max(self.history) + self.every:
            self._evaluate()

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best one before them."""
        return self.patience is not None and sum(at > self.best_at for at in self.history) >= self.patience

    def _on_step(self) -> bool:
        # False ends training: SB3 `on_policy_algorithm.collect_rollouts` returns before the step is stored.
        return not self.is_over

    def _on_training_end(self) -> None:
        if self._n_updates != self.model._n_updates:  # else these weights were evaluated already
            self._evaluate(is_last=True)

    def _evaluate(self, is_last: bool = False) -> None:
        now, self._n_updates, start = self.model.num_timesteps, self.model._n_updates, time.perf_counter()
        with ExitStack() as readable:
            for lm in self._models_read:
                readable.enter_context(gathered(lm))  # a collective: each process then has whole weights
            written, result = (self.best_value, self.best_at), self._measure(now)
            self._share_results()
        try:
            if self.folder is not None and self.best_value != written[0]:
                self._keep(self.folder / "best", result)
            written = self.best_value, self.best_at
            if self.folder is not None and is_main_process():
                self._write_history(self.folder)
        except OSError as error:
            if is_last or not is_full(error) or world() is not None:
                raise
            # Forget this evaluation, so that the next rollout's start repeats it; `written` is the best on the disk.
            del self.history[now]
            self.measured.pop(now, None)
            self.best_value, self.best_at = written
            warnings.warn(
                f"The evaluation at {now:,} tokens could not be kept: {explain(error, self.folder or '.')} It is made "
                "again after the next iteration.",
                stacklevel=2,
            )
        self.logger.record("time/evaluation_seconds", time.perf_counter() - start)
        self.logger.dump(now)

    @property
    def _models_read(self) -> list[LMActorCritic]:
        """The models whose weights an evaluation reads: the policy and, if it is a model, the reference.

        Raises:
            ValueError: If weights are sharded and rank 0 would build a reference, which one process cannot.
        """
        policy, reference = cast("LMPolicy", self.model.policy).lm, self.kwargs.get("reference")
        if isinstance(reference, KLPenalty):
            reference = reference.reference
        if policy.shards is not None and not isinstance(reference, (LMActorCritic, NoneType)):
            raise ValueError(
                "Expected a KLPenalty, or another policy's `lm`, as `reference` with sharded weights, got "
                f"{reference!r:.80}: rank 0 reads it alone, and what it builds could not be sharded."
            )
        return [policy, reference] if isinstance(reference, LMActorCritic) else [policy]

    def _measure(self, now: int) -> Evaluation | None:
        """Evaluate in all processes; on rank 0 log the figures, and note whether the model is the best so far."""
        result = evaluate_together(self.model, self.prompts, self.tokenizer, self.metrics, **self.kwargs)
        if result is None:
            return None
        if self.best not in result.figures:
            raise ValueError(f"Expected `best` to be one of {list(result.figures)}, got {self.best!r}.")
        self.history[now] = {name: figure.value for name, figure in result.figures.items()}
        first = min(self.history)
        self.measured = {at: scored for at, scored in self.measured.items() if at == first} | {now: result}
        if first in self.measured and {"reward", "judge"} <= result.figures.keys():
            self.history[now]["gap"] = judge_gap(self.measured[first], result)
        value = self.history[now][self.best]
        if self.sign * value > self.sign * self.best_value:
            self.best_value, self.best_at = value, now
        for name, number in self.history[now].items():
            self.logger.record(f"eval/{name}", number)
        return result

    def _keep(self, folder: Path, result: Evaluation | None) -> None:
        """Write the model and its evaluation; all processes must call it, and only rank 0 has a result."""
        with replaced_together(output_folder(folder, "best model", overwrite=True)) as beside:
            tokenizer = self.tokenizer if isinstance(self.tokenizer, PreTrainedTokenizerBase) else None
            export(self.model, tokenizer, beside / "model")
            once(lambda: self._write_best(beside, result))

    def _write_best(self, folder: Path, result: Evaluation | None) -> None:
        assert result is not None, "only rank 0 calls this, and it has a result"
        result.save(folder / "evaluation")
        best = {"figure": self.best, "value": self.best_value, "num_timesteps": self.best_at}
        (folder / "best.json").write_text(json.dumps(best) + "\n", encoding="utf-8")

    def _write_history(self, folder: Path) -> None:
        write_scores(folder / SCORES_FILE, self.measured)
        rows = [
            {"num_timesteps": at, "figures": {name: finite(value) for name, value in figures.items()}}
            for at, figures in self.history.items()
        ]
        write_text(folder / "history.json", json.dumps(rows, indent=1) + "\n")


def _numbers(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in figures.items()}
