"""The command `textenv tune`: trials of one configuration with drawn values, until the best is a file."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from stable_baselines3.common.callbacks import BaseCallback

from textenv import __version__

from ..configuration.config import RunOptions, TrainConfig
from ..configuration.search import Range, TuneConfig, read_ranges, value_at
from ..errors import CommandError, Exit, Interrupted
from ..evaluation.evaluate_callback import Evaluate
from ..evaluation.tables import cell, markdown
from ..files import write_text
from ..policies.lm_policy import LMPolicy
from .assemble import Parts, assemble, task_name, trust_of
from .dry_run import dry_run
from .folder import RunFolder, to_line
from .plan import Plan
from .remaining import clock, is_evaluated
from .screens import JsonScreen, PlainScreen, Row, Screen
from .study import Study, Trial, load_optuna
from .train import make_screen, train_in

Configure = Callable[[list[str]], tuple[TuneConfig, RunOptions, str]]
ORDER = ("done", "over max_kl", "pruned", "failed", "running")  # of the table


def tune(config: TuneConfig, options: RunOptions, configure: Configure) -> int:
    """Search, or join or continue a search: run trials until there are as many as the configuration says.

    Args:
        config: The configuration of the search.
        options: The options of the command line.
        configure: A function that parses further words behind those of the command, as `train_config` does.

    Returns:
        The exit code.

    Raises:
        CommandError: If anything goes wrong, with one line and an exit code.
        MissingExtraError: If Optuna is not installed.
    """
    load_optuna()
    ranges = check_search(config, options, configure)
    plain = replace(_as_training(config), out=None)
    if options.dry_run:
        dry_run(plain, options)
        print(f"{config.trials} trials of that length at most, of {', '.join(one.key for one in ranges)}")
        return Exit.DONE
    study = Study(Path(config.out or f"runs/tune-{task_name(config)}"), config, ranges)
    search = Search(study, config, options, configure)
    try:
        while search.step():
            pass
    except KeyboardInterrupt as error:  # between two trials, or while one is built
        raise Interrupted("interrupted; the same command goes on", signal.SIGINT) from error
    return search.finish()


def check_search(config: TuneConfig, options: RunOptions, configure: Configure) -> list[Range]:
    """Return the ranges of a search, after all checks that can be made without training.

    Args:
        config: The configuration of the search.
        options: The options of the command line.
        configure: The function that parses further words.

    Raises:
        CommandError: If a key does not exist, does not take the ends of its range, or the configuration is refused.
    """
    trust, ranges = trust_of(options), []
    for one in read_ranges(config.tune.ranges):
        values = []
        for word in one.words(one.ends):
            try:
                other = configure([word])[0]
                parts = Parts(_as_training(other), trust)
                if one.key.startswith("env."):
                    parts.env  # noqa: B018  # builds it, which checks its arguments
            except (CommandError, ValueError) as error:
                raise CommandError(f"tune.ranges: {error}", getattr(error, "code", Exit.REFUSED)) from error
            values.append(value_at(other, one.key))
        if not one.choices and not all(isinstance(value, (int, float)) for value in values):
            raise CommandError(f"Expected choices in tune.ranges.{one.key}, which takes no numbers, got low and high.")
        ranges.append(one._replace(is_whole=not one.choices and all(isinstance(value, int) for value in values)))
    parts = assemble(_as_training(config), trust, progress_bar=not options.quiet)
    env = parts.held_out
    if env.masks or env.is_multi_turn or cast("LMPolicy", parts.agent.policy).lm.sampling.has_support:
        raise CommandError(
            "Expected a task without masks and replies, and no top_k, top_p or min_p, for textenv tune: the divergence "
            "of an evaluation does not know which tokens were allowed."
        )
    return ranges


def _as_training(config: TrainConfig) -> TrainConfig:
    """Return the part of a search's configuration that a training has."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})


class PruningCallback(BaseCallback):
    """The callback that reports the evaluations of a trial to the study, and ends its training when it is pruned.

    Args:
        evaluate: The callback that evaluates, which comes before it.
        trial: The trial.
        config: The trial's configuration.
    """

    def __init__(self, evaluate: Evaluate, trial: Trial, config: TrainConfig) -> None:
        super().__init__()
        self.evaluate, self.trial, self.config = evaluate, trial, config
        self.is_pruned, self.last = False, -1

    def _on_rollout_start(self) -> None:
        for at, figures in self.evaluate.history.items():
            if at > self.last:
                self.last = at
                value, kl = figures[self.config.evaluation.best], figures["kl"]
                self.is_pruned |= self.trial.report(at // self.config.evaluation.every, value, kl)

    def _on_step(self) -> bool:
        return not self.is_pruned  # as in `Evaluate`: False ends training before the step is stored


class TrialScreen:
    """The screen of one trial's training: its lines and rows have the trial's number.

    Args:
        screen: The screen of a run. A plain one shows the rows with evaluations alone.
        number: The trial's number.
    """

    def __init__(self, screen: Screen, number: int) -> None:
        self.screen, self.number = screen, number

    def begin(self, tokens: int, rows: Sequence[Row]) -> None:
        """Take note of the tokens and rows that a trial begins with."""
        self.screen.begin(tokens, rows)

    def say(self, text: str) -> None:
        """Show a line. Tables are left out: the run's folder has them."""
        if "\n" not in text:
            self.screen.say(f"trial {self.number}: {text}")

    def note(self, text: str) -> None:
        """Show a line; a signal handler may call this."""
        self.screen.note(text)

    def row(self, row: Row) -> None:
        """Show the figures of an iteration."""
        if not isinstance(self.screen, PlainScreen) or is_evaluated(row):
            self.screen.row(row)

    def samples(self, rows: Sequence[Row]) -> None:
        """Show texts of the policy."""
        self.screen.samples(rows)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.screen.close()


class Search:
    """A process's part of a search: it trains trials, keeps the table and the best configuration, and tidies up.

    A finished trial keeps its figures, samples and configuration, and not its checkpoints and models, unless it is the
    best one so far.

    Args:
        study: The study.
        config: The configuration of the search.
        options: The options of the command line.
        configure: The function that parses further words.
    """

    def __init__(self, study: Study, config: TuneConfig, options: RunOptions, configure: Configure) -> None:
        self.study, self.config, self.options, self.configure = study, config, options, configure
        self.figure = config.evaluation.best
        self.seconds: list[float] = []
        self.plans: dict[tuple[str, ...], Plan] = {}  # by the words of a trial
        self.screen = make_screen(config, options)
        keys = ", ".join(one.key for one in study.ranges)
        self.screen.say(f"search: {study.folder}, {config.trials} trials of {keys}")
        if config.evaluation.prompts is None and not config.evaluation.env_args:
            self.screen.say("the evaluations use the prompts of training: evaluation.prompts or .env_args set others")

    def step(self) -> bool:
        """Train a trial; return False if there is none left to take."""
        start = time.monotonic()
        gc.collect()  # SB3's models and their callbacks refer to each other: the trial before would keep its memory
        with self.study.taken(self.config.trials) as trial:
            if trial is None:
                return False
            self.screen.say(f"trial {trial.number}: {'  '.join(word.removeprefix('--') for word in trial.words)}")
            self._end(trial, *self._train(trial))
        self.seconds.append(time.monotonic() - start)
        self._show(trial.number)
        return True

    def _plan(self, words: list[str]) -> Plan:
        """Return the training with the values that the words of a trial set."""
        key = tuple(words)
        if key not in self.plans:
            config, _, dumped = self.configure(words)
            values = yaml.safe_load(dumped)
            for name in ("tune", "trials"):
                del values[name]
            values["out"] = None  # a training from this file makes a folder of its own
            dumped = yaml.safe_dump(values, sort_keys=False)
            self.plans[key] = Plan(replace(_as_training(config), out=None), dumped)
        return self.plans[key]

    def _train(self, trial: Trial) -> tuple[str | None, bool]:
        """Train a trial to its end; return why that is impossible, if it is, and whether the trial was pruned."""
        run, callbacks = trial.run, []
        try:
            plan = self._plan(trial.words)
            if not run.has_checkpoint():
                run.clear()
                run.begin(plan.dumped, __version__)

            def watch(evaluate: Evaluate) -> PruningCallback:
                callbacks.append(PruningCallback(evaluate, trial, plan.config))
                return callbacks[0]

            screen = TrialScreen(make_screen(plan.config, self.options, {"trial": trial.number}), trial.number)
            train_in(run, plan.config, self.options, screen, watch)
        except CommandError as error:
            if error.code in (Exit.REFUSED, Exit.NUMERICS) or isinstance(error.__cause__, torch.OutOfMemoryError):
                return str(error), False
            if error.code >= Exit.SIGNAL:  # which says how to go on
                raise
            line = f"trial {trial.number}: {error} Once that is mended, the same command goes on."
            raise CommandError(line, error.code) from error
        return None, callbacks[0].is_pruned

    def _end(self, trial: Trial, note: str | None, is_pruned: bool) -> None:
        with self.study.alone():
            if note is None:
                after = trial.run.read_results()
                figures = {"tokens": after["num_timesteps"], **after["figures"]}
                self.study.tell(trial, self.figure, figures, is_pruned)
            else:
                self.study.give_up(trial, note)
            self._keep_best()

    def _keep_best(self) -> None:
        """Write the table and the best configuration, and remove the models of other finished trials."""
        rows = self.study.rows()
        best = self.study.best(rows)
        write_text(self.study.folder / "trials.md", self._table(rows) + "\n")
        if best is not None:
            plan = self._plan(best["words"])
            write_text(self.study.folder / "best.yml", f"{self._origin(best, len(rows))}{plan.dumped}")
        for row in rows:
            if row["state"] != "running" and (best is None or row["trial"] != best["trial"]):
                _strip(self.study.run(row["trial"]))

    def _origin(self, best: Mapping[str, Any], n: int) -> str:
        value, kl = (best["figures"][name] for name in (self.figure, "kl"))
        bound = f"{kl:.2f} nats a text from the start; tune.max_kl is {self.config.tune.max_kl:g}"
        return (
            f"# The best of {n} trials of `textenv tune` in {self.study.folder}: trial {best['trial']}.\n"
            f"# On the prompts of evaluations: {self.figure} {value:.3f}, {bound}.\n"
            "# It was chosen by this figure, which is therefore a little too good: measure it on other prompts.\n"
            f"# Searched: {', '.join(best['values'])}.\n"
        )

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> str:
        sign = 1 if self.study.is_maximised else -1
        ordered = sorted(rows, key=lambda row: (ORDER.index(row["state"]), -sign * (row["value"] or 0)))
        keys = [one.key for one in self.study.ranges]
        cells = []
        for row in ordered:
            values = [_drawn(row["values"][key]) if key in row["values"] else "" for key in keys]
            figures = [cell(row["figures"].get(name)) for name in (self.figure, "kl", "tokens")]
            note = f": {row['note']}".replace("|", "/") if row["note"] else ""
            cells.append([str(row["trial"]), f"{row['state']}{note}", *values, *figures])
        return markdown(["trial", "state", *keys, self.figure, "kl", "tokens"], cells)

    def _show(self, number: int) -> None:
        rows = self.study.rows()
        row, best = rows[number], self.study.best(rows)
        if isinstance(self.screen, JsonScreen):
            shown = {key: value for key, value in row.items() if key not in ("value", "words")}
            print(to_line({**shown, "best": best and best["trial"]}), end="", flush=True)
            return
        left = (self.config.trials - len(rows)) * sum(self.seconds) / len(self.seconds)
        figures = [f"{name} {cell(row['figures'].get(name))}" for name in (self.figure, "kl") if row["figures"]]
        said = f"trial {number}: {row['state']}  {'  '.join(figures)}{row['note'] or ''}"
        self.screen.say(f"{said}  best: {'none' if best is None else best['trial']}  left {clock(max(left, 0))}")

    def finish(self) -> int:
        """Print the table and the best trial; return the exit code.

        Raises:
            CommandError: If no trial is feasible, and none is running.
        """
        with self.study.alone():
            self._keep_best()  # a process may have been killed before it did
        rows = self.study.rows()
        best = self.study.best(rows)
        self.screen.say(self._table(rows))
        n_running = sum(row["state"] == "running" for row in rows)
        if n_running:
            self.screen.say(f"{n_running} trials are still running in other processes")
        if best is not None:
            file, run = self.study.folder / "best.yml", self.study.run(best["trial"])
            self.screen.say(f"best: trial {best['trial']}, {file}   its run: {run.path}")
        elif not n_running:
            raise CommandError(self._without_best(rows), Exit.FAILED)
        self.screen.close()
        return Exit.DONE

    def _without_best(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Return the line that says why no trial is the best."""
        if all(row["state"] == "failed" for row in rows):
            return f"Expected a trial that can be trained, got {len(rows)} that failed, the first by: {rows[0]['note']}"
        return (
            f"Expected a trial with a finite {self.figure} and a divergence of at most {self.config.tune.max_kl:g} "
            f"nats a text (tune.max_kl), got none of {len(rows)}: raise tune.max_kl, or change the ranges. "
            f"{self.study.folder / 'trials.md'} has the trials."
        )


def _strip(run: RunFolder) -> None:
    """Remove the checkpoints and models of a finished trial."""
    for folder in (run.checkpoints, run.model, run.best):
        shutil.rmtree(folder, ignore_errors=True)


def _drawn(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
