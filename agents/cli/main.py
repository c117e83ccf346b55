"""The command `textenv`: the table of its verbs, and how each reads its arguments. `--help` does not load torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..configuration.config import ProcessOptions, RunOptions, TrainConfig, TrainOptions, TrustOptions
from ..configuration.search import TuneConfig
from ..configuration.stage_folders import check_folders
from ..errors import HANDLED, CommandError, Exit
from ..runs.plan import Plan
from .arguments import check_file, make_parser, parse, parse_options, set_defaults, split, with_config
from .ending import asks_for_processes, end_by_error, end_by_interrupt, is_one_of_several, refuse
from .help_groups import overview
from .named_models import check_model, refuse_zip, with_source
from .options import (
    ChatOptions,
    ClassifierConfig,
    CompareOptions,
    CriticConfig,
    DoctorOptions,
    EvaluateOptions,
    ExaminedRun,
    ExportFlags,
    ExportOptions,
    GenerateOptions,
    OneModel,
    RateConfig,
    RateOptions,
    RewardModelConfig,
    SFTConfig,
    ShowOptions,
)
from .page_options import ReportOptions, ShowFlags, WatchOptions
from .seeds import read_seeds
from .stage_options import SharedStageOptions, StageOptions
from .verb import Verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; an error is printed as one line.

    Args:
        arguments: The words after `textenv`; by default those of this process.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # huggingface_hub would report what is used
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(overview(VERBS))
            return Exit.DONE
        if words[0] == "--version":
            from textenv import __version__  # which loads gymnasium

            print(f"textenv {__version__}")
            return Exit.DONE
        if words[0] not in VERBS:
            from textenv.checks.signatures import nearest  # which loads gymnasium

            raise CommandError(f"Expected a verb among {', '.join(VERBS)}, got {words[0]!r}{nearest(words[0], VERBS)}")
        if asks_for_processes(words):
            from .launch import launch  # which loads torch

            return launch(words)
        return _run(words[0], words[1:])
    except CommandError as error:
        return refuse(error)
    except KeyboardInterrupt as interrupt:
        return end_by_interrupt(interrupt, words[0], STAGES)
    except HANDLED as error:
        return end_by_error(error)


def train_config(words: list[str], verb: str = "train") -> tuple[TrainConfig, Any, str]:
    """Parse the words after a verb that takes a `TrainConfig`.

    Args:
        words: The words; a configuration file may come first.
        verb: "train", "tune", "doctor" or "critic".

    Returns:
        The configuration, the options of the command line, and the configuration as YAML.

    Raises:
        CommandError: If a key or value, on the command line or in the file, is unknown or refused.

    Example:
        >>> config, options, dumped = train_config(["--model.name", "gpt2", "--quiet"])
        >>> config.model.name, options.quiet
        ('gpt2', True)
    """
    does, usage, kind, options = VERBS[verb][:4]
    parser = make_parser(verb, usage, kind, options, f"{does[0].upper()}{does[1:]}.")
    words = with_config(words)
    check_file(words)
    if not {"-h", "--help"} & set(words):
        # Some defaults depend on other keys, so the words are parsed twice; --print_config would already exit here.
        plain = [word for word in words if not word.startswith("--print_config")]
        words = set_defaults(parser, words, split(parser, plain, kind, options)[0])
    return split(parser, words, kind, options)


def read_config(path: Path) -> TrainConfig:
    """Return the configuration in a run's config.yml.

    Raises:
        CommandError: If the file is damaged, or has unknown keys.
    """
    try:
        return train_config(["--config", str(path)])[0]
    except UnicodeDecodeError as error:
        raise CommandError(f"Expected YAML in {path}, got bytes that are no UTF-8.") from error
    except CommandError as error:
        raise CommandError(f"{path}: {error} If an older textenv wrote it, mend that line.", error.code) from error


def _run(name: str, words: list[str]) -> int:
    module, _, function = VERBS[name].function.partition(":")

    def do(*arguments: Any) -> int:
        return int(getattr(import_module(module), function)(*arguments))

    if is_one_of_several():
        from .launch import set_timeout  # here and below: what loads torch
        from .processes import take_part

        set_timeout(words)
        return take_part(name, lambda: VERBS[name].read(name, words), do)
    return do(*VERBS[name].read(name, words))


def _read(name: str, words: list[str], config: Any = None) -> tuple[Any, Any]:
    """Return a verb's arguments as two dataclasses: `config`, by default the verb's own, and the options."""
    verb, config = VERBS[name], config or VERBS[name].config
    parser = make_parser(name, verb.usage, config, verb.options)
    return split(parser, words, config, verb.options)[:2]


def _read_training(name: str, words: list[str]) -> tuple[Any, ...]:
    options = parse_options(TrainOptions, words)
    if options.resume is None or options.seeds:
        config, chosen, dumped = train_config(words)
        check_folders(with_config(words), config)
        if options.seeds:
            return read_seeds(words, config.out, options, train_config, read_config), chosen
        return [Plan(config, dumped)], chosen
    if not options.resume:
        raise CommandError("Expected --resume RUN, the folder of a run, got --resume alone: it is for --seeds.")
    from ..runs.folder import RunFolder  # here and below: imports that load gymnasium wait, for a quick --help

    run = RunFolder.open(options.resume)
    before = read_config(run.config)
    config, chosen, dumped = train_config(["--config", str(run.config), *words])
    return [Plan(config, dumped, run, before)], chosen


def _read_search(name: str, words: list[str]) -> tuple[Any, ...]:
    config, options, _ = train_config(words, name)
    check_folders(with_config(words), config)
    return config, options, lambda more: train_config([*words, *more], name)


def _read_doctor(name: str, words: list[str]) -> tuple[Any, ...]:
    if re.search(r"(^| )--model[ =](?!\{)", " ".join(words)):  # with braces it is a section of a configuration
        return _read(name, words, OneModel)
    if words and Path(words[0]).is_dir():
        return _read(name, words, ExaminedRun)
    config, options, _ = train_config(words, name)
    check_folders(with_config(words), config)
    return config, options


def _read_stage(name: str, words: list[str]) -> tuple[Any, ...]:
    words = with_config([word.replace("--from-feedback", "--from_feedback") for word in words])
    check_file(words)
    chosen, options = _read(name, words)
    sources = [source for source in ("data", "task", "from_feedback") if hasattr(chosen, source)]
    if chosen.out is None or all(getattr(chosen, source) is None for source in sources):
        raise CommandError(f"Expected --out DIR, and --{' or --'.join(sources)}, for textenv {name}.")
    check_folders(words, chosen)
    return chosen, options


def _read_critic(name: str, words: list[str]) -> tuple[Any, ...]:
    words = with_source(words)
    config, options, dumped = train_config(words, name)
    check_folders(words, config)
    return config, dumped, options


def _read_run(name: str, words: list[str]) -> tuple[Any, ...]:
    chosen, options = _read(name, words)
    return run_config(chosen.run), chosen, options


def _read_model(name: str, words: list[str]) -> tuple[Any, ...]:
    if name == "rate" and words and not words[0].startswith("-"):
        words = ["--model", *words]  # not positional for `rate`, which also works without a model
    chosen, options = _read(name, words)
    return None if chosen.model is None else run_or_model(chosen.model), chosen, options


def _read_runs(name: str, words: list[str]) -> tuple[Any, ...]:
    # jsonargparse reads a list from a single word: RUN RUN becomes '["RUN", "RUN"]'.
    n_runs = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    runs = [str(list(words[:n_runs])).replace("'", '"')] if n_runs else []
    verb = VERBS[name]
    parser = make_parser(name, verb.usage, verb.config, verb.options)
    next(action for action in parser._actions if action.dest == "runs").metavar = "RUN"
    parsed = parse(parser, [*runs, *words[n_runs:]])
    return parsed.runs, parsed.out, *([parsed.watch] if verb.options else [])


def _read_nothing(name: str, words: list[str]) -> tuple[Any, ...]:
    does = VERBS[name].does.capitalize()
    parse(ArgumentParser(prog=f"textenv {name}", description=f"{does}.", exit_on_error=False), words)
    return ()


def run_config(path: str) -> TrainConfig:
    """Return the configuration of a run by its folder.

    Raises:
        CommandError: If it is not the folder of a run.
    """
    from ..runs.folder import RunFolder

    refuse_zip(path)
    return read_config(RunFolder.open(path).config)


def run_or_model(path: str) -> TrainConfig | None:
    """Return the configuration of a run by its folder; None for a model by its folder or name.

    Raises:
        CommandError: If it is neither.
    """
    refuse_zip(path)
    if (Path(path) / "run.json").is_file():
        return run_config(path)
    check_model(path)
    return None


STAGES = ("sft", "classifier", "reward-model", "critic")
CONFIG = "[CONFIG.yml] [--key value ...]"
STAGE = "[CONFIG.yml] (--data FILE | --task NAME) --out DIR [--key value ...]"
VERBS = {
    "train": Verb(
        "train a model on a task, or continue a run",
        CONFIG,
        TrainConfig,
        TrainOptions,
        "agents.report.training:train",
        _read_training,
    ),
    "tune": Verb(
        "search for the best settings in ranges", CONFIG, TuneConfig, RunOptions, "agents.runs.tune:tune", _read_search
    ),
    "sft": Verb(
        "fine-tune a model on texts, or on prompts and references",
        STAGE,
        SFTConfig,
        SharedStageOptions,
        "agents.cli.stages:tune_model",
        _read_stage,
    ),
    "classifier": Verb(
        "train a classifier of texts",
        STAGE,
        ClassifierConfig,
        SharedStageOptions,
        "agents.cli.stages:classify",
        _read_stage,
    ),
    "reward-model": Verb(
        "train a model that scores texts",
        STAGE,
        RewardModelConfig,
        SharedStageOptions,
        "agents.cli.stages:train_scorer",
        _read_stage,
    ),
    "critic": Verb(
        "fit the critic to texts of the start, before PPO",
        "RUN|MODEL|CONFIG.yml --out DIR [--key value ...]",
        CriticConfig,
        StageOptions,
        "agents.cli.critic:train_critic",
        _read_critic,
    ),
    "evaluate": Verb(
        "compare a run's model before and after training, with intervals",
        "RUN [--metrics '[NAME, ...]'] [--key value ...]",
        EvaluateOptions,
        ProcessOptions,
        "agents.cli.trained_model:evaluate_run",
        _read_run,
    ),
    "generate": Verb(
        "write texts that continue prompts, as lines of JSON",
        "RUN|MODEL [--prompts FILE] [--key value ...]",
        GenerateOptions,
        ProcessOptions,
        "agents.cli.trained_model:generate_lines",
        _read_model,
    ),
    "chat": Verb(
        "chat with a model in the terminal",
        "RUN|MODEL [--key value ...]",
        ChatOptions,
        TrustOptions,
        "agents.cli.chat:talk",
        _read_model,
    ),
    "rate": Verb(
        "let people score a model's texts, and train on the scores",
        "[RUN|MODEL --prompts FILE] [--web | --train] [--key value ...]",
        RateConfig,
        RateOptions,
        "agents.cli.rate:rate",
        _read_model,
    ),
    "show": Verb(
        "print an episode token by token",
        "RUN [--prompt N] [--seed N] [--html | --credit N]",
        ShowOptions,
        ShowFlags,
        "agents.cli.show:show",
        _read_run,
    ),
    "export": Verb(
        "write a run's model as a Hugging Face folder",
        "RUN DIR [--overwrite] [--adapter] [--sb3-zip] [--to_hub REPO]",
        ExportOptions,
        ExportFlags,
        "agents.cli.trained_model:export_run",
        _read_run,
    ),
    "compare": Verb(
        "draw runs, or folders of seeds, and say which are better",
        "RUN RUN ... [--out FILE]",
        CompareOptions,
        None,
        "agents.cli.compare:compare",
        _read_runs,
    ),
    "report": Verb(
        "write a page of what happened in runs, token by token",
        "RUN [RUN ...] [--out FILE] [--watch]",
        ReportOptions,
        WatchOptions,
        "agents.cli.report:report",
        _read_runs,
    ),
    "doctor": Verb(
        "check model and settings before training, or a run after it",
        f"{CONFIG} | --model NAME | RUN [--json]",
        TrainConfig,
        DoctorOptions,
        "agents.cli.doctor:examine",
        _read_doctor,
    ),
    "tasks": Verb(
        "list tasks, rewards, metrics, masks and loggers",
        "",
        None,
        None,
        "agents.cli.catalogue:list_names",
        _read_nothing,
    ),
}
