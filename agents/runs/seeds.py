"""The command `textenv train`: one run, or one for each of several seeds and then a table of all of them."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Sequence
from pathlib import Path

from ..configuration.config import TrainOptions
from ..distributed.world import is_main_process, world
from ..errors import CommandError, Exit, Interrupted
from ..evaluation.curves import draw_curves
from ..evaluation.prompt_scores import SCORES_FILE, PromptScores, scores_in
from ..evaluation.seeds import SeedTable
from ..signals import write_line
from .assemble import task_name
from .changed_keys import changed_keys
from .folder import RunFolder, read_rows
from .loggers import named
from .plan import Plan
from .reporting import Reporter
from .train import make_screen, resume, start

# The errors that another seed may not meet; after any other, such as a full disk, no further seed is started.
OF_ONE_SEED = (Exit.FAILED, Exit.NUMERICS, Exit.REWARD)


def train(plans: Sequence[Plan], options: TrainOptions, reporter: Reporter | None = None) -> int:
    """Start or resume the runs, one after the other in this process; with seeds, write and print their table.

    Args:
        plans: The runs: one for each seed, or a single one.
        options: The options of the command line. With --dry-run nothing is resumed or written.
        reporter: The writer of reports; None writes none.

    Returns:
        The exit code.

    Raises:
        CommandError: If a run fails. With seeds, its message names the seed, and others are trained nevertheless if the
            error may be that seed's alone, and there is one process; no table is written then.
    """
    if options.dry_run:
        return start(plans[0].config, plans[0].dumped, options)
    if not options.seeds:
        return _train_one(plans[0], options, reporter)
    try:
        failures = _train_all(plans, options, reporter)
        if failures:
            raise CommandError(_no_table(plans, list(failures)), next(iter(failures.values())).code)
        if is_main_process():
            _finish(plans, options, reporter)
    except KeyboardInterrupt as error:  # between two runs, or during the table
        how = "interrupted; continue with: the same command with --resume"
        raise Interrupted(how, signal.SIGINT) from error
    return Exit.DONE


def _train_all(plans: Sequence[Plan], options: TrainOptions, reporter: Reporter | None) -> dict[int, CommandError]:
    """Train all runs that are not finished, and return the errors of those that failed alone, by seed."""
    failures = {}
    for plan in plans:
        try:
            if _is_done(plan):
                make_screen(plan.config, options).say(f"finished already: {plan.config.out}")
            else:
                _train_one(plan, options, reporter)
        except CommandError as error:
            failure = CommandError(f"seed {plan.config.seed}: {error}", error.code)
            if error.code not in OF_ONE_SEED or world() is not None:  # after an error, processes cannot go on together
                raise failure from error
            failures[plan.config.seed] = failure  # without its traceback, which would keep the run's model in memory
            write_line(f"textenv: {failure}")
        gc.collect()  # an algorithm and its policy refer to each other: without this two models would be in memory
    return failures


def _train_one(plan: Plan, options: TrainOptions, reporter: Reporter | None) -> int:
    if plan.run is None or plan.before is None:
        return start(plan.config, plan.dumped, options, reporter)
    return resume(plan.run, plan.config, plan.before, plan.dumped, options, reporter)


def _is_done(plan: Plan) -> bool:
    """Return whether a run is finished, and its configuration is the one that is asked for."""
    if plan.run is None or plan.before is None or not plan.run.is_finished():
        return False
    return not changed_keys(plan.before, plan.config)


def _no_table(plans: Sequence[Plan], failed: Sequence[int]) -> str:
    """Return the line that says which seeds have failed, and why there is no table of the others."""
    others = [plan.config.seed for plan in plans if plan.config.seed not in failed]
    cure = f"; for a table of the others alone: --seeds {' '.join(map(str, others))} --resume" if others else ""
    names = ", ".join(f"seed {seed}" for seed in failed)
    return (
        f"{len(failed)} of {len(plans)} seeds failed, {names}, and no table is written, since a table of those that "
        f"did not fail would show too much success{cure}."
    )


def _finish(plans: Sequence[Plan], options: TrainOptions, reporter: Reporter | None) -> None:
    """Write seeds.md, seeds.json, a report and, with the logger "curves", seeds.png beside the folders of the seeds."""
    config = plans[0].config
    runs = [RunFolder.open(str(plan.config.out)) for plan in plans]
    folder = runs[0].path.parent
    table = table_of([run.path for run in runs], [str(plan.config.seed) for plan in plans])
    table.save(folder / "seeds")
    if "curves" in [named(logger).id for logger in config.loggers]:
        draw_curves(folder / "seeds.png", {run.path.name: read_rows(run.metrics) for run in runs}, task_name(config))
    screen = make_screen(config, options)
    screen.say(f"{table.to_markdown()}\nseeds: {folder / 'seeds.md'}")
    if reporter is not None:
        screen.say(reporter.of_seeds(folder))
    screen.close()
    if options.json and not options.quiet:
        print(json.dumps({"seeds": table.to_dict()}, ensure_ascii=False), flush=True)


def table_of(folders: Sequence[Path], names: Sequence[str]) -> SeedTable:
    """Return the table of finished runs, from the scores of their first and last evaluations.

    Raises:
        CommandError: If a run has no such scores.
        ValueError: If the seeds have different numbers of prompts.
    """
    scores = [_scores(folder) for folder in folders]
    after = [measured[max(measured)] for measured in scores]
    return SeedTable(after, [measured[min(measured)] for measured in scores], names)


def _scores(folder: Path) -> dict[int, PromptScores]:
    measured = scores_in(folder)
    if not measured:
        raise CommandError(f"Expected the scores of evaluations in {folder / SCORES_FILE}, got none.")
    return measured
