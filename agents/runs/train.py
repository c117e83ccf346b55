"""One run of `textenv train`, new or resumed: from its configuration to its folder."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from textenv import __version__
from textenv.checks.extras import MissingExtraError
from textenv.checks.json_files import read_json
from textenv.episodes.scores import RAISED
from textenv.text.named_tokenizer import DEMO

from ..callbacks.finite_updates import FiniteUpdates
from ..checkpoints.checkpoint import load_checkpoint
from ..checkpoints.hf_export import whole_backbone, write_model
from ..checkpoints.output_folders import output_folder
from ..configuration.config import FREE_ON_RESUME, PLOTTED, RunOptions, TrainConfig, TrainOptions, default_loggers
from ..distributed.collectives import from_main, once
from ..distributed.failures import consequence
from ..distributed.world import is_main_process
from ..errors import CommandError, Exit, Interrupted, is_full
from ..evaluation.curves import draw_curves
from ..evaluation.evaluate_callback import Evaluate
from ..evaluation.evaluation_files import HISTORY
from ..evaluation.tables import cell, markdown
from ..files import write_text
from ..models.backbone import Backbone
from ..policies.actor_critic import LMActorCritic
from ..policies.lm_policy import LMPolicy
from ..policies.reference import start_of
from .assemble import Parts, assemble, task_name, training_callbacks, trust_of
from .changed_keys import changed_keys
from .checkpoints import RunCheckpoints, checkpoint_to_load, needed
from .dry_run import dry_run
from .exit_codes import as_command_error
from .folder import RunFolder, read_rows
from .live_screen import LiveScreen
from .loggers import SamplePages, check_loggers, make_loggers, make_trackers, named
from .model_card import model_card
from .recording import OtherWarnings, Recorder, RowWriter, SampleRecorder
from .reporting import Reporter
from .screens import JsonScreen, PlainScreen, QuietScreen, Row, Screen, SilentScreen, warnings_on
from .shared_folder import check_shared, create_folder, locked_folder
from .stopping import watched_signals
from .token_recording import TokenRecorder

MENDED = (Exit.REFUSED, Exit.MISSING)  # mistakes that the user mends before repeating the command
SPACE_FOR = 2  # checkpoints besides the kept ones that must fit on the disk: a half-written one, and the models

Watch = Callable[[Evaluate], BaseCallback]  # makes a callback that looks at a run's evaluations, and may end the run


def start(config: TrainConfig, dumped: str, options: TrainOptions, reporter: Reporter | None = None) -> int:
    """Start a run and train.

    Args:
        config: The configuration.
        dumped: The configuration as YAML, for config.yml.
        options: The options of the command line.
        reporter: The writer of reports; None writes none.

    Returns:
        The exit code.

    Raises:
        CommandError: If anything goes wrong, with one line and an exit code.
    """
    check_loggers(config.loggers, trust_of(options))
    if options.dry_run:
        return dry_run(config, options, max(1, len(options.seeds)))
    run = create_folder(config.out, task_name(config))
    run.is_of_seeds = bool(options.seeds)
    with locked_folder(run):
        once(lambda: _begin(run, dumped))
        try:
            return train_in(run, config, options, _screen(config, options), reporter=reporter)
        except CommandError as error:
            # Nothing was trained: do not leave a run behind.
            if error.code in MENDED and is_main_process() and not read_rows(run.metrics):
                run.withdraw()
            raise
        except KeyboardInterrupt as error:
            interrupted = _interrupted(run)  # before `withdraw`: its advice depends on the folder
            if is_main_process() and not run.has_checkpoint():
                run.withdraw()
            raise interrupted from error


def _begin(run: RunFolder, dumped: str) -> None:
    run.clear()
    run.begin(dumped, __version__)


def resume(
    run: RunFolder,
    config: TrainConfig,
    before: TrainConfig,
    dumped: str,
    options: TrainOptions,
    reporter: Reporter | None = None,
) -> int:
    """Resume a run. Changed keys are printed; those that influence the weights need `--change KEY`.

    Args:
        run: The run.
        config: The new configuration.
        before: The configuration of the run so far.
        dumped: The new configuration as YAML, for config.yml.
        options: The options of the command line.
        reporter: The writer of reports; None writes none.

    Returns:
        The exit code.

    Raises:
        CommandError: If a key differs that `--change` does not name.
    """
    check_loggers(config.loggers, trust_of(options))
    run.is_of_seeds = bool(options.seeds)
    changed = changed_keys(before, config)
    screen = _screen(config, options)
    for key, (old, new) in changed.items():
        screen.say(f"changed: {key}: {old!r} -> {new!r}")
    other = [key for key in changed if key.split(".")[0] not in FREE_ON_RESUME and key not in options.change]
    if other:
        flags = " ".join(f"--change {key}" for key in other)
        raise CommandError(f"Expected the configuration of {run.path}, got another: to use it, add {flags}.")
    with locked_folder(run):
        if changed:
            once(lambda: _change(run, dumped))
        try:
            return train_in(run, config, options, screen, reporter=reporter)
        except KeyboardInterrupt as error:
            raise _interrupted(run) from error


def _change(run: RunFolder, dumped: str) -> None:
    run.results.unlink(missing_ok=True)  # those of another configuration
    write_text(run.config, dumped)


def _interrupted(run: RunFolder) -> Interrupted:
    """Return the error for a Ctrl-C before training has begun, or after it has ended."""
    return Interrupted(f"interrupted; {run.how_to_go_on()}", signal.SIGINT)


def make_screen(config: TrainConfig, options: RunOptions, first: Row | None = None) -> Screen:
    """Return the screen for the options: quiet, JSON, live in a terminal, or plain.

    Args:
        config: The configuration of the run.
        options: The options of the command line.
        first: Keys and values that lines of JSON begin with, to tell one run of several from the others.
    """
    if not is_main_process():
        return SilentScreen()
    if options.quiet:
        return QuietScreen()
    if options.json:
        return JsonScreen(first)
    sizes = config.total_tokens, config.evaluation.every
    return LiveScreen(*sizes) if sys.stdout.isatty() else PlainScreen(*sizes)


def _screen(config: TrainConfig, options: TrainOptions) -> Screen:
    return make_screen(config, options, {"seed": config.seed} if options.seeds else None)


def train_in(
    run: RunFolder,
    config: TrainConfig,
    options: RunOptions,
    screen: Screen,
    watch: Watch | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Train in a locked folder, from its newest checkpoint if it has one.

    Args:
        run: The run.
        config: Its configuration.
        options: The options of the command line.
        screen: The screen, which is closed at the end.
        watch: A function that makes a callback for the run's evaluations, which then have the divergence from the start
            as the figure `kl`.
        reporter: The writer of reports; None writes none.

    Returns:
        The exit code.

    Raises:
        CommandError: If anything goes wrong, with one line, an exit code, and a traceback in the log.
    """
    # A full disk ends TensorBoard's writing thread with an error. `loggers.TensorBoard` writes the figures again later,
    # so the traceback, which Python would print by this hook, would only garble the live view.
    previous = threading.excepthook
    threading.excepthook = lambda thread: None if is_full(thread.exc_value) else previous(thread)
    try:
        # Nothing else runs in this process meanwhile, so that all warnings are the run's.
        with warnings_on(screen):
            return _run(run, config, options, screen, watch, reporter)
    except RAISED as error:
        lost = consequence(error)
        command_error = lost or as_command_error(error, run.path)
        # An error that we raised for the user says everything in its line; any other needs its traceback.
        says_all = command_error in (error, lost) or isinstance(error, MissingExtraError)
        is_kept = (not says_all or command_error.code not in MENDED) and run.keep_traceback()
        hint = f" (the traceback is in {run.log})" if is_kept and not says_all else ""
        raise CommandError(f"{command_error}{hint}", command_error.code) from error
    finally:
        threading.excepthook = previous
        screen.close()


def _run(
    run: RunFolder,
    config: TrainConfig,
    options: RunOptions,
    screen: Screen,
    watch: Watch | None,
    reporter: Reporter | None,
) -> int:
    check_shared(run)
    _announce(run, config, screen)
    is_main, trust = is_main_process(), trust_of(options)
    checkpoint = from_main("a checkpoint", checkpoint_to_load(run, screen.say) if is_main else None)
    parts = assemble(config, trust, progress_bar=not options.quiet and is_main)
    agent = parts.agent
    once(lambda: _check(run, parts, screen))
    # Before a checkpoint's weights are loaded.
    reference = None if watch is None else start_of(cast("LMPolicy", agent.policy).lm)
    writer = RowWriter()
    if checkpoint is not None:
        load_checkpoint(agent, checkpoint)
        screen.say(f"resumed from {checkpoint}: {agent.num_timesteps:,} tokens")
    done = agent.num_timesteps
    # Trackers have all rows until the run stopped. `cut` removes the rows after the checkpoint, to be made again.
    sent = max((row["tokens"] for row in read_rows(run.metrics)), default=-1) if done else -1
    once(lambda: run.cut(done if checkpoint is not None else -1))
    outputs = make_loggers(run, config, trust, done) if is_main else []
    # Otherwise SB3 `base_class._setup_learn` would make a logger of its own.
    agent.set_logger(Logger(None, [writer, *outputs]))
    evaluate = _evaluate(run, parts, reference)
    trackers = make_trackers(run, config, sent) if is_main else []
    pages = [SamplePages(output) for output in outputs if isinstance(output, TensorBoardOutputFormat)]
    reports = [reporter.of_run(run.path)] if reporter is not None and is_main else []
    views: list[Any] = [screen, *trackers, *pages, *reports]
    kept = config.checkpoint_every, config.keep_checkpoints
    with watched_signals(run, screen) as interrupts:
        callbacks = [  # `Recorder` after all that log; `RunCheckpoints` last, when a checkpoint's rows are on the disk
            *training_callbacks(config, trust),
            FiniteUpdates(),
            evaluate,
            *([] if watch is None else [watch(evaluate)]),
            *_recorders(run, parts, writer, views),
            OtherWarnings(screen.say),
            RunCheckpoints(run, *kept, interrupts, lambda: evaluate.is_over, screen.say),
        ]
        screen.begin(done, read_rows(run.metrics))
        if done < config.total_tokens:
            once(lambda: run.results.unlink(missing_ok=True))  # those of a finished run that is to train on
            _learn(agent, config.total_tokens - done, callbacks, is_fresh=checkpoint is None)
        if evaluate.is_over and agent.num_timesteps < config.total_tokens:
            screen.say(_early(evaluate))
        agent.logger.close()
        for tracker in trackers:
            tracker.close()
        backbone = whole_backbone(cast("LMPolicy", agent.policy))
        once(lambda: _finish(run, parts, screen, backbone))
        for report in reports:
            screen.say(report.finish())
        if watch is not None and interrupts.number:  # in the last iteration; further trials must not start
            raise Interrupted(f"stopped after {agent.num_timesteps:,} tokens; {run.how_to_go_on()}", interrupts.number)
    return Exit.DONE


def _learn(agent: OnPolicyAlgorithm, n_tokens: int, callbacks: list[Any], is_fresh: bool) -> None:
    """Train for so many tokens more.

    Without a reset, SB3 `base_class._setup_learn` adds the tokens trained so far to the total, so that the schedule of
    the learning rate continues where it stopped.
    """
    agent.learn(
        n_tokens,
        callback=CallbackList(callbacks),
        log_interval=1,  # every iteration is a row; the default of SB3 `a2c.A2C.learn` is 100
        reset_num_timesteps=is_fresh,
    )


def _check(run: RunFolder, parts: Parts, screen: Screen) -> None:
    """Check that the run's tokenizer, packages and free space are as they should be."""
    run.check_vocabulary(parts.tokenizer.get_vocab())
    if changed := run.changed_versions():
        screen.say(f"other versions than at the start of the run: {', '.join(changed)}; figures may differ a little")
    run.check_space(needed(parts.agent) * (parts.config.keep_checkpoints + SPACE_FOR))


def _early(evaluate: Evaluate) -> str:
    """Return the line of a run that its evaluations have stopped."""
    since = f"no better {evaluate.best} since {evaluate.best_at:,} tokens"
    return f"stopped early: {since} (evaluation.patience {evaluate.patience})"


def _announce(run: RunFolder, config: TrainConfig, screen: Screen) -> None:
    """Say what is trained, where it is written, and what a missing package leaves out."""
    if config.env.id == config.model.name == DEMO:
        screen.say("the built-in demo: a tiny GPT-2 learns to write positive reviews")
    screen.say(f"run: {run.path}")
    if config.loggers == default_loggers() and (absent := [name for name in PLOTTED if name not in config.loggers]):
        screen.say(f'without {" and ".join(absent)}, which pip install "textenv[plot]" brings')


def _recorders(run: RunFolder, parts: Parts, writer: RowWriter, views: list[Any]) -> list[BaseCallback]:
    """Return the callbacks that write the run's rows of samples, tokens and figures."""
    config = parts.config
    every, show = config.samples_every, partial(_show_samples, views)
    tokens = [TokenRecorder(run, parts.tokenizer, every, config.total_tokens)] if config.samples else []  # type: ignore[arg-type]
    samples = SampleRecorder(run, parts.held_out, config.samples, every, show)
    return [samples, *tokens, Recorder(run, writer, partial(_show_row, views))]


def _show_row(views: list[Any], row: Row) -> None:
    for view in views:
        view.row(row)


def _show_samples(views: list[Any], rows: list[Row]) -> None:
    for view in views:
        view.samples(rows)


def _evaluate(run: RunFolder, parts: Parts, reference: LMActorCritic | None) -> Evaluate:
    evaluation = parts.config.evaluation
    return Evaluate(
        list(parts.held_out.prompts)[: evaluation.n_prompts],
        parts.tokenizer,  # type: ignore[arg-type]
        parts.metrics,
        every=evaluation.every,
        folder=run.path,
        best=evaluation.best,
        higher_is_better=evaluation.higher_is_better,
        patience=evaluation.patience,
        env=parts.held_out,
        judge=parts.judge,
        n=evaluation.n,
        reference=reference,
    )


def _finish(run: RunFolder, parts: Parts, screen: Screen, backbone: Backbone) -> None:
    """Write curves, results and the language model with its card, and print their paths."""
    config = parts.config
    rows = read_rows(run.metrics)
    if "curves" in [named(logger).id for logger in config.loggers]:
        draw_curves(run.path / "curves.png", {run.path.name: rows}, task_name(config))
    history = read_json(run.path / "history.json", HISTORY)
    if not history:
        raise CommandError(f"Expected at least one evaluation in {run.path / 'history.json'}, got none.")
    before, after = history[0], history[-1]
    figures = [[name, cell(before["figures"].get(name)), cell(value)] for name, value in after["figures"].items()]
    text = markdown(["figure", "before", "after"], figures)
    write_text(run.path / "results.md", text + "\n")
    with output_folder(run.model, "language model", overwrite=True) as draft:
        write_model(backbone, parts.tokenizer, draft)
        (draft / "README.md").write_text(model_card(config, run.read_about(), text), encoding="utf-8")
    # Last, since `RunFolder.is_finished` reads it.
    write_text(run.results, json.dumps({"before": before, "after": after}, indent=1) + "\n")
    screen.say(f"{text}\nmodel: {run.model}   best: {run.best / 'model'}   figures: {run.metrics}")
