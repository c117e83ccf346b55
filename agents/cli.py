"""The command line `textenv`: its verbs, what they take and how they end; torch is loaded by those that need it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from .arguments import check_file, make_parser, parse, parse_options, split, with_config
from .config import DEMO, TrainConfig, TrainOptions, default_settings
from .refusal import CommandError, Exit, StageStopped
from .stage_folders import check_folders
from .verb_config import (
    ChatOptions,
    ClassifierConfig,
    CompareOptions,
    EvaluateOptions,
    ExportFlags,
    ExportOptions,
    GenerateOptions,
    RateConfig,
    RateOptions,
    RewardModelConfig,
    SFTConfig,
    ShowOptions,
    StageOptions,
    TrustOptions,
)

# What the parts of a run raise where they are given what they cannot work with.
HANDLED = (ValueError, TypeError, ImportError, OSError, ArithmeticError, MemoryError, RecursionError)


class Verb(NamedTuple):
    """A verb of the command: what it does in a line, and the function that takes what comes behind it."""

    does: str
    run: Callable[[list[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are printed as one line.

    Args:
        arguments: What stands behind `textenv`; those of the process by default.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_overview())
            return Exit.DONE
        if words[0] not in VERBS:
            from textenv.signatures import nearest  # which loads gymnasium

            raise CommandError(f"Expected a verb among {', '.join(VERBS)}, got {words[0]!r}{nearest(words[0], VERBS)}")
        if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise CommandError(f"Expected one process, got WORLD_SIZE={size}: several train a script with make_agent.")
        return int(VERBS[words[0]].run(words[1:]))
    except CommandError as error:
        return _refuse(error)
    except KeyboardInterrupt as interrupt:
        _say(f"textenv: interrupted{_what_is_saved(words[0], bool(interrupt.args))}")
        return interrupt.code if isinstance(interrupt, StageStopped) else Exit.SIGNAL + 2
    except HANDLED as error:
        from .failures import as_command_error

        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return Exit.DONE
        return _refuse(as_command_error(error, Path.cwd()))


def _what_is_saved(verb: str, has_state: bool) -> str:
    """Return how to go on after Ctrl-C, where a stage may have saved its state, or a run has none yet."""
    if has_state:
        return ": the same command with --resume goes on"
    if verb == "train":
        return ": nothing was saved yet, the same command starts again"
    return ": the same command starts again, with --resume from what was saved last" if verb in STAGES else ""


def _refuse(error: CommandError) -> int:
    from textenv.printable import printable

    _say(f"textenv: {printable(str(error))}")
    return error.code


def _say(line: str) -> None:
    with suppress(OSError):  # of a terminal that is gone: the exit code still says it
        print(line, file=sys.stderr, flush=True)


def _overview() -> str:
    lines = "\n".join(f"  {name:<14}{verb.does}" for name, verb in VERBS.items())
    return (
        "usage: textenv VERB ...\n\nReinforcement learning of language models on text.\n\n"
        f"{lines}\n\n`textenv train` alone runs the built-in demo. `textenv VERB --help` says what each takes.\n"
        "Exit codes: 0 done, 1 unexpected (of doctor: something to mend), 2 usage or refusal, 3 numerics, 4 reward,\n"
        "5 storage, 6 a missing package, 130 and 143 interrupted."
    )


def train_config(words: list[str], verb: str = "train", options: type = TrainOptions) -> tuple[TrainConfig, Any, str]:
    """Return what `textenv train`, or another verb of a configuration, was told, and the configuration as YAML."""
    does = VERBS[verb].does
    usage = "[CONFIG.yml] [--key value ...]"
    parser = make_parser(verb, usage, TrainConfig, options, f"{does[0].upper()}{does[1:]}.")
    words = with_config(words)
    check_file(words)
    if not {"-h", "--help"} & set(words):
        plain = [word for word in words if not word.startswith("--print_config")]
        parser.set_defaults(default_settings(split(parser, plain, TrainConfig, options)[0]))
    return split(parser, words, TrainConfig, options)


def read_config(path: Path) -> TrainConfig:
    """Return the configuration that a run has kept.

    Raises:
        CommandError: If it is damaged, or has keys that are not known today.
    """
    try:
        return train_config(["--config", str(path)])[0]
    except UnicodeDecodeError as error:
        raise CommandError(f"Expected YAML in {path}, got bytes that are no UTF-8.") from error
    except CommandError as error:
        raise CommandError(f"{path}: {error} If an older textenv wrote it, mend that line.", error.code) from error


def _train(words: list[str]) -> int:
    resumed = parse_options(TrainOptions, words).resume
    if resumed is not None:
        from .run_folder import RunFolder

        run = RunFolder.open(resumed)
        before = read_config(run.config)
        config, options, dumped = train_config(["--config", str(run.config), *words])
        from .training_run import resume

        return resume(run, config, before, dumped, options)
    config, options, dumped = train_config(words)
    check_folders(with_config(words), config)
    from .training_run import start

    return start(config, dumped, options)


def _sft(words: list[str]) -> int:
    config, options = _stage("sft", words, SFTConfig)
    from .stage_verbs import tune_model

    return tune_model(config, options)


def _classifier(words: list[str]) -> int:
    config, options = _stage("classifier", words, ClassifierConfig)
    from .stage_verbs import classify

    return classify(config, options)


def _reward_model(words: list[str]) -> int:
    words = [word.replace("--from-feedback", "--from_feedback") for word in words]
    config, options = _stage("reward-model", words, RewardModelConfig, ("data", "task", "from_feedback"))
    from .stage_verbs import train_scorer

    return train_scorer(config, options)


def _stage(verb: str, words: list[str], config: type, sources: Sequence[str] = ("data", "task")) -> tuple[Any, Any]:
    words = with_config(words)
    check_file(words)
    chosen, allowed = _options(verb, "[CONFIG.yml] --data FILE --out DIR", words, config, StageOptions)
    if chosen.out is None or all(getattr(chosen, source) is None for source in sources):
        raise CommandError(f"Expected --out DIR, and --{' or --'.join(sources)}, for textenv {verb}.")
    check_folders(words, chosen)
    return chosen, allowed


def _doctor(words: list[str]) -> int:
    config, options, _ = train_config(words, "doctor", TrustOptions)
    check_folders(with_config(words), config)
    from .verbs import examine

    return examine(config, options)


def _evaluate(words: list[str]) -> int:
    chosen, options = _options("evaluate", "RUN [--metrics ...]", words, EvaluateOptions)
    config = run_config(chosen.run)
    from .verbs import evaluate_run

    return evaluate_run(config, chosen, options)


def _generate(words: list[str]) -> int:
    chosen, options = _options("generate", "RUN|MODEL --prompts FILE", words, GenerateOptions)
    config = run_or_model(chosen.model)
    from .verbs import generate_lines

    return generate_lines(config, chosen, options)


def _chat(words: list[str]) -> int:
    chosen, options = _options("chat", "RUN|MODEL", words, ChatOptions)
    config = run_or_model(chosen.model)
    from .chat import talk

    return talk(config, chosen, options)


def _rate(words: list[str]) -> int:
    words = ["--model", *words] if words and not words[0].startswith("-") else words
    usage = "[RUN|MODEL --prompts FILE] [--terminal | --web] [--train]"
    chosen, options = _options("rate", usage, words, RateConfig, RateOptions)
    config = None if chosen.model is None else run_or_model(chosen.model)
    from .rate import rate

    return rate(config, chosen, options)


def _export(words: list[str]) -> int:
    chosen, options = _options("export", "RUN DIR [--sb3-zip] [--to_hub REPO]", words, ExportOptions, ExportFlags)
    config = run_config(chosen.run)
    from .verbs import export_run

    return export_run(config, chosen, options)


def _show(words: list[str]) -> int:
    chosen, options = _options("show", "RUN [--prompt N]", words, ShowOptions)
    config = run_config(chosen.run)
    from .show import show

    return show(config, chosen, options)


def _compare(words: list[str]) -> int:
    n_runs = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    runs = [str(list(words[:n_runs])).replace("'", '"')] if n_runs else []
    parser = make_parser("compare", "RUN RUN ... [--out FILE]", CompareOptions)
    next(action for action in parser._actions if action.dest == "runs").metavar = "RUN"
    parsed = parse(parser, [*runs, *words[n_runs:]])
    from .compare import compare

    return compare(parsed.runs, parsed.out)


def _tasks(words: list[str]) -> int:
    parser = ArgumentParser(
        prog="textenv tasks", description="List tasks, rewards, metrics, masks and loggers.", exit_on_error=False
    )
    parse(parser, words)
    from .catalogue import catalogue

    print(catalogue())
    return Exit.DONE


def _options(verb: str, usage: str, words: list[str], config: type, options: type = TrustOptions) -> tuple[Any, Any]:
    parser = make_parser(verb, usage, config, options)
    chosen, allowed, _ = split(parser, words, config, options)
    return chosen, allowed


def run_config(path: str) -> TrainConfig:
    """Return the configuration of a run."""
    from .run_folder import RunFolder

    _refuse_zip(path)
    return read_config(RunFolder.open(path).config)


def run_or_model(path: str) -> TrainConfig | None:
    """Return the configuration of a run; None where there is a model or a name instead."""
    _refuse_zip(path)
    if (Path(path) / "run.json").is_file():
        return run_config(path)
    if path != DEMO:
        _check_model(path)
    return None


def _check_model(path: str) -> None:
    from textenv.model_loading import check_name

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise CommandError(
            f"Expected the folder of a run, with run.json, or of a model, with config.json, got {path}, with neither."
        )
    try:
        check_name(path, f'the folder of a run or of a model, the name of a model on the hub, or "{DEMO}"')
    except ValueError as error:
        raise CommandError(str(error)) from error


def _refuse_zip(path: str) -> None:
    if path.endswith(".zip"):
        raise CommandError(
            f"Expected the folder of a run or of a model, got the file {path}, which is SB3's and holds pickles: read "
            "it in Python, model = agents.load_sb3_zip(path, make_agent(...)), then agents.export(model, tokenizer, "
            "folder)."
        )


STAGES = ("sft", "classifier", "reward-model")
VERBS = {
    "train": Verb("train a model on a task; go on with a run", _train),
    "sft": Verb("tune a model on texts, or on prompts and references", _sft),
    "classifier": Verb("train a model that tells labels of texts apart", _classifier),
    "reward-model": Verb("train a model that scores texts", _reward_model),
    "evaluate": Verb("a run's figures before and after, with intervals", _evaluate),
    "generate": Verb("continue the prompts of a file, as lines of JSON", _generate),
    "chat": Verb("talk with a model in the terminal", _chat),
    "rate": Verb("have people score what a model writes, and train on it", _rate),
    "show": Verb("replay an episode token by token", _show),
    "export": Verb("write a run's model as a Hugging Face folder", _export),
    "compare": Verb("several runs in one picture and a table", _compare),
    "doctor": Verb("check model, tokenizer, reward and settings before training", _doctor),
    "tasks": Verb("list tasks, rewards, metrics, masks and loggers", _tasks),
}


if __name__ == "__main__":
    sys.exit(main())
