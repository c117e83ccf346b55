"""The study of a search: Optuna's file of trials, which several processes share, and trials that were broken off."""

from __future__ import annotations

import fcntl
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from textenv.checks.extras import needs

from ..configuration.config import FREE_ON_RESUME
from ..configuration.search import Range, TuneConfig
from ..errors import CommandError
from .changed_keys import differences
from .folder import RunFolder

NAME = "textenv"  # the study's, in a file that has no other
CONFIGURATION, FIGURES, NOTE = "configuration", "figures", "note"  # the attributes that we add to Optuna's own
BOUND = "max_kl"  # the constraint's name
# The number of trials that are drawn at random, and of finished ones from which on others are pruned. The sampler's own
# default is ten, which would be half of a search.
STARTUP = 5
Drawn = list[tuple[Range, Any]]  # each range with its drawn value
WAIT = 60.0  # seconds to wait for another process that is writing to the file


class TrialFolder(RunFolder):
    """The run folder of a trial, which the search continues itself."""

    def how_to_go_on(self) -> str:
        """Return the advice after a stop."""
        return "the same command goes on"


class Trial:
    """A trial of this process, whose folder is locked: the values that it drew, and its reports.

    Args:
        trial: Optuna's trial.
        drawn: The drawn value of each range.
        run: The trial's run folder.
        max_kl: The bound on the divergence, in nats a text.
        reported: The steps that were reported before the trial was broken off.
    """

    def __init__(self, trial: Any, drawn: Drawn, run: TrialFolder, max_kl: float, reported: Sequence[int]) -> None:
        self.trial, self.drawn, self.run, self.max_kl = trial, drawn, run, max_kl
        self.number = int(trial.number)
        self.reported = set(reported)

    @property
    def words(self) -> list[str]:
        """The words of a command line that set the trial's values."""
        return [word for one, drawn in self.drawn for word in one.words([drawn])]

    def report(self, step: int, value: float, kl: float) -> bool:
        """Report an evaluation; return whether to break the trial off.

        Args:
            step: The evaluation's number in tokens, in whole intervals between evaluations, by which trials with
                rollouts of other sizes can be compared.
            value: The figure.
            kl: The divergence, in nats a text. Above the bound the value counts as unknown, so that no feasible trial
                is pruned since it is worse than an infeasible one.
        """
        if step not in self.reported:
            self.reported.add(step)
            self.trial.report(value if kl <= self.max_kl else math.nan, step)
        with warnings.catch_warnings():
            # Optuna `pruners._percentile` takes np.nanmax and np.nanpercentile, which warn if all values are unknown.
            warnings.simplefilter("ignore", RuntimeWarning)
            return bool(self.trial.should_prune())


class Study:
    """The trials of a search, in the file `study.db` of its folder, which Optuna writes with SQLite.

    Only numbers, names and JSON are read from the file, and no pickle: Optuna pickles in its storage of journals and
    its sampler CMA-ES, of which neither is used. A value from the file has no more rights than one of a configuration:
    it must be in its range, a choice is looked up in the configuration's own list, and both are parsed as the command
    line is.

    A process locks the folder while it takes a trial or ends one, and the trial's own folder while it trains. The
    kernel frees a lock when its process ends, however it ends: an unfinished trial in a free folder was broken off, and
    the next process that asks for one takes it up. Optuna's heartbeat would need a thread that writes, minutes of
    waiting, and would try the same values again from the start.

    Args:
        folder: The folder of the search.
        config: The search's configuration.
        ranges: Its ranges.

    Raises:
        MissingExtraError: If Optuna is not installed.
        CommandError: If the file is of another configuration, or not of a search.
    """

    def __init__(self, folder: Path, config: TuneConfig, ranges: Sequence[Range]) -> None:
        self.folder, self.ranges, self.seed = folder, ranges, config.seed
        self.max_kl, self.is_maximised = config.tune.max_kl, config.evaluation.higher_is_better
        self.optuna = load_optuna()
        if set("?{}") & set(str(folder)):  # Optuna formats the address of a file, and SQLAlchemy parses it
            raise CommandError(f"Expected a folder without ?, {{ and }} in its name, got {folder}: give another --out.")
        if (folder / "run.json").is_file():
            raise CommandError(f"Expected the folder of a search, or a new one, got the run {folder}: give --out.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"Expected a folder to write to, got {folder}: {error.strerror}.") from error
        with self.alone():
            try:
                self.study = self._open(folder / "study.db")
                kept, trials = self.study.user_attrs.get(CONFIGURATION), self.study.get_trials(deepcopy=False)
            except Exception as error:  # SQLAlchemy's and Optuna's errors have no common base
                line = str(error).partition("\n")[0]
                raise CommandError(f"Expected Optuna's study in {folder / 'study.db'}, got: {line}") from error
            own = fingerprint(config)
            if kept is None and not trials:
                self.study.set_user_attr(CONFIGURATION, own)
            elif kept != own:
                changed = differences(kept, own) if isinstance(kept, dict) else {}
                said = "; ".join(f"{key}: {old!r:.60} -> {new!r:.60}" for key, (old, new) in changed.items())
                raise CommandError(
                    f"Expected the configuration that {folder} was begun with, got another ({said or 'all of it'}): "
                    "give another --out."
                )

    def _open(self, file: Path) -> Any:
        optuna = self.optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would print a line for each trial
        storage = optuna.storages.RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": WAIT}})
        return optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction="maximize" if self.is_maximised else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process takes or ends a trial; wait until the folder is free."""
        with (self.folder / "lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def taken(self, n: int) -> Iterator[Trial | None]:
        """Take up a trial that was broken off, or else a new one; None if there are `n` trials already.

        Within, its folder is locked.

        Args:
            n: The number of trials.
        """
        with ExitStack() as held:
            with self.alone():
                trial = self._broken_off(held) or self._new(n, held)
            yield trial

    def _broken_off(self, held: ExitStack) -> Trial | None:
        for frozen in self.study.get_trials(states=(self.optuna.trial.TrialState.RUNNING,)):
            run = self.run(frozen.number)
            try:
                held.enter_context(run.locked())
            except CommandError:  # another process trains it
                continue
            # Optuna's public functions take up a trial by its id alone, as its integrations do: `Trial(study, id)`.
            trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
            return self._trial(trial, run, list(frozen.intermediate_values))
        return None

    def _new(self, n: int, held: ExitStack) -> Trial | None:
        number = len(self.study.get_trials(deepcopy=False))
        if number >= n:
            return None
        run = self.run(number)
        held.enter_context(run.locked())
        self.study.sampler = self._sampler(number)
        return self._trial(self.study.ask(), run)

    def _sampler(self, number: int) -> Any:
        """Return a sampler for one trial. Its seed depends on the trial's number: another process draws the same."""
        (seed,) = np.random.SeedSequence([self.seed, number]).generate_state(1)
        return self.optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=int(seed))

    def _trial(self, trial: Any, run: TrialFolder, reported: Sequence[int] = ()) -> Trial:
        self.study.sampler = self._sampler(trial.number)  # for values that were not drawn when it was broken off
        drawn = [(one, _draw(trial, one)) for one in self.ranges]
        self._check(drawn)
        return Trial(trial, drawn, run, self.max_kl, reported)

    def _check(self, drawn: Drawn) -> None:
        for one, value in drawn:
            if not one.has(value):
                where = self.folder / "study.db"
                raise CommandError(f"Expected values of {one.key} within its range in {where}, got {value!r:.80}.")

    def run(self, number: int) -> TrialFolder:
        """Return the run folder of a trial, which is made if there is none."""
        run = TrialFolder(self.folder / "trials" / f"{number:03}")
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def tell(self, trial: Trial, figure: str, figures: Mapping[str, Any], is_pruned: bool = False) -> None:
        """End a trial.

        Whether it is feasible is a constraint of Optuna, and no penalty on its value: that would need a price of a nat
        in rewards, which nobody knows. Of infeasible trials the sampler prefers those closer to the bound.

        Args:
            trial: The trial.
            figure: The name of the figure to compare trials by.
            figures: All figures of its last evaluation, and its number of tokens.
            is_pruned: Whether it was broken off on purpose.
        """
        value, kl = figures.get(figure), figures.get("kl")
        if value is None or kl is None:
            self.give_up(trial, f"no finite {figure} or kl")
            return
        trial.trial.set_user_attr(FIGURES, {**figures})
        if not is_pruned:  # of a pruned trial it would be another model's: it is compared by where it was pruned
            self._bound(trial, kl - self.max_kl)
        state = self.optuna.trial.TrialState
        values = {"state": state.PRUNED} if is_pruned else {"values": value}
        self.study.tell(trial.trial, **values)

    def give_up(self, trial: Trial, note: str) -> None:
        """End a trial whose values cannot be trained with, and keep the sampler away from them: they are infeasible.

        Args:
            trial: The trial.
            note: The reason.
        """
        trial.trial.set_user_attr(NOTE, note)
        self._bound(trial, math.inf)
        self.study.tell(trial.trial, state=self.optuna.trial.TrialState.PRUNED)

    def _bound(self, trial: Trial, excess: float) -> None:
        if BOUND not in trial.trial.constraints:  # a process may have been killed just behind this line
            trial.trial.set_constraint(BOUND, excess)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each trial by number: state, values by key, figures and note.

        The states are "done", "over max_kl", "pruned", "failed" and "running".
        """
        return [self._row(frozen) for frozen in self.study.get_trials(deepcopy=False)]

    def _row(self, frozen: Any) -> dict[str, Any]:
        state = self.optuna.trial.TrialState
        drawn = [(one, frozen.params[one.key]) for one in self.ranges if one.key in frozen.params]
        self._check(drawn)
        figures, note = frozen.user_attrs.get(FIGURES), frozen.user_attrs.get(NOTE)
        words = {state.RUNNING: "running", state.COMPLETE: "done"}
        named = "failed" if note is not None else words.get(frozen.state, "pruned")
        if named == "done" and any(excess > 0 for excess in frozen.constraints.values()):
            named = "over max_kl"
        return {
            "trial": frozen.number,
            "state": named,
            "values": {one.key: one.value(value) for one, value in drawn},
            "figures": figures if isinstance(figures, dict) else {},
            "note": note,
            "value": frozen.value if named == "done" else None,
            "words": [word for one, value in drawn for word in one.words([value])],
        }

    def best(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return the row of the best feasible trial, the earliest of equal ones; None if there is none."""
        done = [dict(row) for row in rows if row["state"] == "done"]
        sign = 1 if self.is_maximised else -1
        return max(done, key=lambda row: sign * row["value"], default=None)


def load_optuna() -> Any:
    """Return the package optuna.

    Raises:
        MissingExtraError: If it is not installed.
    """
    with needs("tune", "optuna", "textenv tune"):
        import optuna
    return optuna


def _draw(trial: Any, one: Range) -> Any:
    """Return a trial's value of one range, drawn now unless it was drawn before."""
    if one.choices:
        return trial.suggest_categorical(one.key, one.names)
    if one.is_whole:
        return trial.suggest_int(one.key, int(one.low), int(one.high), log=one.log)
    return trial.suggest_float(one.key, one.low, one.high, log=one.log)


def fingerprint(config: TuneConfig) -> dict[str, Any]:
    """Return what all trials of a study share: the configuration, but for keys without influence on the weights."""
    kept = {key: value for key, value in asdict(config).items() if key not in (*FREE_ON_RESUME, "trials")}
    fingerprint: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return fingerprint
