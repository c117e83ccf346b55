"""The command line `textenv`: its verbs, what they take and how they end; torch is loaded by those that need it."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from .config import DEMO_SETTINGS, TrainConfig, TrainOptions, argument_help
from .refusal import CommandError, Exit
from .verb_config import (
    ChatOptions,
    CompareOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    RewardModelConfig,
    SFTConfig,
    SFTOptions,
    ShowOptions,
    StageOptions,
    TrustOptions,
)

ONLY_HERE = "only on the command line"


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
            raise CommandError(f"Expected a verb among {', '.join(VERBS)}, got {words[0]!r}{_nearest(words[0], VERBS)}")
        if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise CommandError(f"Expected one process, got WORLD_SIZE={size}: several train a script with make_agent.")
        return int(VERBS[words[0]].run(words[1:]))
    except CommandError as error:
        print(f"textenv: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("textenv: interrupted", file=sys.stderr)
        return Exit.SIGNAL + 2
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError) as error:
        from .failures import as_command_error

        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return Exit.DONE
        known = as_command_error(error, Path.cwd())
        print(f"textenv: {known}", file=sys.stderr)
        return known.code


def _overview() -> str:
    lines = "\n".join(f"  {name:<14}{verb.does}" for name, verb in VERBS.items())
    return (
        "usage: textenv VERB ...\n\nReinforcement learning of language models on text.\n\n"
        f"{lines}\n\n`textenv train` alone runs the built-in demo. `textenv VERB --help` says what each takes.\n"
        "Exit codes: 2 usage or refusal, 3 numerics, 4 reward, 5 storage, 130 interrupted."
    )


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else "."


def make_parser(verb: str, usage: str, config: type, options: type | None = None) -> ArgumentParser:
    """Return a verb's parser: the fields of a dataclass, and of another one that configurations cannot set.

    Args:
        verb: Its name.
        usage: What stands behind it.
        config: What a configuration file may have as well, where `usage` has one.
        options: What the command line alone says.
    """
    description = (config.__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(
        prog=f"textenv {verb}", usage=f"textenv {verb} {usage}", description=description, exit_on_error=False
    )
    if "CONFIG" in usage:
        parser.add_argument("--config", action=ActionConfigFile, help="A YAML file; what follows overrides it.")
    parser.add_class_arguments(config, as_group=False, as_positional=True)
    helps = _helps(config)
    if options is not None:
        _add_options(parser.add_argument_group(ONLY_HERE), options)
    for action in parser._actions:
        if action.dest in helps:
            action.help = helps[action.dest]
    return parser


def make_options_parser(options: type) -> argparse.ArgumentParser:
    """Return a parser of the options alone, which knows of no configuration file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_options(parser, options)
    return parser


def _add_options(group: Any, options: type) -> None:
    texts = argument_help(options)
    for one in fields(options):
        flag = f"--{one.name}"
        kind = str(one.type)  # a text, since annotations are not evaluated there
        if kind == "bool":
            both = dict.fromkeys((flag, flag.replace("_", "-")))
            group.add_argument(*both, action="store_true", help=texts[one.name])
        elif kind.startswith("list"):
            group.add_argument(flag, action="append", default=[], metavar="NAME", help=texts[one.name])
        else:
            group.add_argument(flag, type=str, metavar=one.name.upper(), help=texts[one.name])


def _helps(config: type, above: str = "") -> dict[str, str]:
    """Return the help of every argument of a dataclass and those in it, by dotted name."""
    texts = {f"{above}{name}": text for name, text in argument_help(config).items()}
    for name, kind in get_type_hints(config).items():
        if is_dataclass(kind) and isinstance(kind, type):
            texts |= _helps(kind, f"{above}{name}.")
    return texts


def parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    """Parse what stands behind a verb.

    Raises:
        CommandError: For unknown names, with the nearest known one, and for wrong types.
    """
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        known = [action.dest for action in parser._actions]
        message = " ".join(str(error).split())
        found = re.search(r"unrecognized arguments?: --([\w.]+)|(?:[Kk]ey|option) ['\"]([\w.]+)['\"]", message)
        group = re.search(r"Group '([\w.]+)'", message)
        name = (f"{group[1]}." if group else "") + (found[1] or found[2]) if found else ""
        hint = _nearest(name, known) if name and name not in known else ""
        raise CommandError(message.rstrip(".") + (hint or ".")) from error


def _with_config(words: list[str]) -> list[str]:
    """Put --config in front of a configuration file that is given bare."""
    return ["--config", *words] if words and not words[0].startswith("-") else words


def _check_file(words: list[str]) -> None:
    """Refuse a configuration file that is not there, or is no plain YAML, in a line."""
    import yaml

    for flag, path in itertools.pairwise(words):
        if flag != "--config":
            continue
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CommandError(f"Expected a configuration file, got {path}: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise CommandError(f"Expected plain YAML in {path}, got: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise CommandError(f"Expected keys and values in {path}, got {type(found).__name__}.")


def _split(parser: ArgumentParser, words: list[str], config: type, options: type) -> tuple[Any, Any, str]:
    """Return the configuration, the options, and the configuration as YAML.

    Raises:
        CommandError: If a configuration file has set an option: it would allow itself what only a person may.
    """
    parsed = parse(parser, words)
    alone = make_options_parser(options).parse_known_args(words)[0]
    for one in fields(options):
        if getattr(parsed, one.name) != getattr(alone, one.name):
            raise CommandError(f"Expected {one.name} {ONLY_HERE}, got it in a configuration file.")
    names = [one.name for one in fields(options)]
    rest = Namespace(**{key: value for key, value in vars(parsed).items() if key not in (*names, "config")})
    built = parser.instantiate(rest)
    dumped = parser.dump(rest, skip_validation=True)
    chosen = {one.name: getattr(parsed, one.name) for one in fields(options)}
    return config(**{one.name: getattr(built, one.name) for one in fields(config)}), options(**chosen), dumped


def train_config(words: list[str], verb: str = "train", options: type = TrainOptions) -> tuple[TrainConfig, Any, str]:
    """Return what `textenv train`, or another verb of a configuration, was told, and the configuration as YAML."""
    parser = make_parser(verb, "[CONFIG.yml] [--key value ...]", TrainConfig, options)
    words = _with_config(words)
    _check_file(words)
    names = {word.partition("=")[0] for word in words}
    if not names & {"--config", "--env.id", "--model.name", "--env", "--model"}:
        parser.set_defaults(DEMO_SETTINGS)
    return _split(parser, words, TrainConfig, options)


def read_config(path: Path) -> TrainConfig:
    """Return the configuration that a run has kept.

    Raises:
        CommandError: If it is damaged, or has keys that are not known today.
    """
    try:
        return train_config(["--config", str(path)])[0]
    except CommandError as error:
        raise CommandError(f"{path}: {error} If an older textenv wrote it, mend that line.", error.code) from error


def _train(words: list[str]) -> int:
    resumed = make_options_parser(TrainOptions).parse_known_args(words)[0].resume
    if resumed is not None:
        from .run_folder import RunFolder

        run = RunFolder.open(resumed)
        before = read_config(run.config)
        config, options, dumped = train_config(["--config", str(run.config), *words])
        from .training_run import resume

        return resume(run, config, before, dumped, options)
    config, options, dumped = train_config(words)
    from .training_run import start

    return start(config, dumped, options)


def _sft(words: list[str]) -> int:
    config, options = _stage("sft", words, SFTConfig, SFTOptions)
    from .stage_verbs import tune_model

    return tune_model(config, options)


def _reward_model(words: list[str]) -> int:
    config, options = _stage("reward-model", words, RewardModelConfig, StageOptions)
    from .stage_verbs import train_scorer

    return train_scorer(config, options)


def _stage(verb: str, words: list[str], config: type, options: type) -> tuple[Any, Any]:
    parser = make_parser(verb, "[CONFIG.yml] --data FILE --out DIR", config, options)
    words = _with_config(words)
    _check_file(words)
    chosen, allowed, _ = _split(parser, words, config, options)
    if chosen.data is None or chosen.out is None:
        raise CommandError(f"Expected --data FILE and --out DIR for textenv {verb}.")
    return chosen, allowed


def _doctor(words: list[str]) -> int:
    config, options, _ = train_config(words, "doctor", TrustOptions)
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


def _export(words: list[str]) -> int:
    chosen, options = _options("export", "RUN DIR", words, ExportOptions)
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
    parsed = parse(parser, [*runs, *words[n_runs:]])
    from .compare import compare

    return compare(parsed.runs, parsed.out)


def _tasks(words: list[str]) -> int:
    parser = ArgumentParser(
        prog="textenv tasks", description="List tasks, rewards, metrics and masks.", exit_on_error=False
    )
    parse(parser, words)
    from .catalogue import catalogue

    print(catalogue())
    return Exit.DONE


def _options(verb: str, usage: str, words: list[str], config: type) -> tuple[Any, Any]:
    parser = make_parser(verb, usage, config, TrustOptions)
    chosen, options, _ = _split(parser, words, config, TrustOptions)
    return chosen, options


def run_config(path: str) -> TrainConfig:
    """Return the configuration of a run."""
    from .run_folder import RunFolder

    return read_config(RunFolder.open(path).config)


def run_or_model(path: str) -> TrainConfig | None:
    """Return the configuration of a run; None where there is a model or a name instead."""
    return run_config(path) if (Path(path) / "run.json").is_file() else None


VERBS = {
    "train": Verb("train a model on a task; go on with a run", _train),
    "sft": Verb("tune a model on texts, or on prompts and references", _sft),
    "reward-model": Verb("train a model that scores texts", _reward_model),
    "evaluate": Verb("a run's figures before and after, with intervals", _evaluate),
    "generate": Verb("continue the prompts of a file, as lines of JSON", _generate),
    "chat": Verb("talk with a model in the terminal", _chat),
    "show": Verb("replay an episode token by token", _show),
    "export": Verb("write a run's model as a Hugging Face folder", _export),
    "compare": Verb("several runs in one picture and a table", _compare),
    "doctor": Verb("check model, tokenizer, reward and settings before training", _doctor),
    "tasks": Verb("list tasks, rewards, metrics and masks", _tasks),
}


if __name__ == "__main__":
    sys.exit(main())
