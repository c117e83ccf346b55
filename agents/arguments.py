"""From the words behind a verb to its configuration and options; without torch."""

from __future__ import annotations

import argparse
import itertools
import re
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)
from yaml import YAMLError

from .config import DEMO_PPO_SETTINGS, DEMO_SETTINGS, PPO_NAMES, ModelConfig, TrainConfig, argument_help
from .plain_yaml import check_bounds, read_yaml
from .refusal import CommandError
from .values import check_values

MODE = "textenv"  # of jsonargparse: its YAML, with bounds
ONLY_HERE = "only on the command line"


def make_parser(
    verb: str, usage: str, config: type, options: type | None = None, does: str | None = None
) -> ArgumentParser:
    """Return a verb's parser: the fields of a dataclass, and of another one that configurations cannot set.

    Args:
        verb: Its name.
        usage: What stands behind it.
        config: What a configuration file may have as well, where `usage` has one.
        options: What the command line alone says.
        does: What the verb does, where that is not what the first line of `config` says.
    """
    set_loader(MODE, _load, (YAMLError,))
    # It would import, and in arguments build, what stands behind a key `class_path`; so it knows `Named` itself, too.
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=["agents.Named", "agents.config.Named"],
        instantiate_subclass_spec_in_any=False,
    )
    parser = ArgumentParser(
        prog=f"textenv {verb}",
        usage=f"textenv {verb} {usage}",
        description=does or _first_line(config),
        exit_on_error=False,
        parser_mode=MODE,
        allow_abbrev=False,  # else a key that lacks its last letters is taken for it
    )
    if "CONFIG" in usage:
        parser.add_argument("--config", action=ActionConfigFile, help="A YAML file; what follows overrides it.")
    parser.add_class_arguments(config, as_group=False, as_positional=True)
    helps = _helps(config)
    if options is not None:
        _add_options(parser.add_argument_group(ONLY_HERE), options)
    for action in parser._actions:
        check_values(action)
        if action.dest in helps:
            action.help = helps[action.dest] + (_two_defaults(action.dest) if config is TrainConfig else "")
        elif action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS  # it would explain our dataclasses
        elif action.dest == "print_config":
            action.help = "Print all keys with the values that would be used, and exit."
            action.metavar = ""
    for group in parser._action_groups:
        kind = getattr(group, "group_class", None)  # of the dataclass whose fields it has
        if kind is not None:
            group.title = f"{group.dest}: {_first_line(kind)}".rstrip(".")
    return parser


def _first_line(config: type) -> str:
    return (config.__doc__ or "").partition("\n")[0]


def _two_defaults(key: str) -> str:
    """Return what help says of a key whose default depends on the model; the rest it says by itself."""
    for settings, case in ((DEMO_SETTINGS, ""), (DEMO_PPO_SETTINGS, f" and {' or '.join(PPO_NAMES)}")):
        if key in settings:
            case += ", where that divides a rollout" if key == "algorithm.batch_size" else ""
            default = f'{settings[key]} with the model "{ModelConfig.name}"{case}; else %(default)s'
            return f" (type: %(type)s, default: {default})"
    return ""


def make_options_parser(options: type) -> argparse.ArgumentParser:
    """Return a parser of the options alone, which knows of no configuration file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_options(parser, options)
    return parser


def parse_options(options: type, words: list[str]) -> argparse.Namespace:
    """Return the options alone of what stands behind a verb.

    Raises:
        CommandError: If one lacks its value, or has one and takes none.
    """
    try:
        return make_options_parser(options).parse_known_args(words)[0]
    except argparse.ArgumentError as error:
        raise CommandError(f"{error}.") from error


def _add_options(group: Any, options: type) -> None:
    texts = argument_help(options)
    for one in fields(options):
        flag = f"--{one.name}"
        kind = str(one.type)  # a text, since annotations are not evaluated there
        both = dict.fromkeys((flag, flag.replace("_", "-")))
        if kind == "bool":
            group.add_argument(*both, action="store_true", help=texts[one.name])
        elif kind.startswith("list"):
            group.add_argument(*both, action="append", default=[], metavar="NAME", help=texts[one.name])
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
    except (ArgumentError, ImportError) as error:  # ImportError: how it refuses an import, at some places
        known = [action.dest for action in parser._actions]
        message = " ".join(str(error).split())
        if denied := re.search(r"Importing '([^']*)' is not allowed, denied by", message):
            raise CommandError(
                f"Expected names, or keys and values, got the class {denied[1]!r}: id: module:Class, args: {{...}}."
            ) from error
        found = re.search(r"unrecognized arguments?: --([\w.]+)|(?:[Kk]ey|[Oo]ption) ['\"]([\w.]+)['\"]", message)
        group = re.search(r"Group '([\w.]+)'", message)
        name = (f"{group[1]}." if group else "") + (found[1] or found[2]) if found else ""
        hint = ""
        if name and name not in known:
            from textenv.signatures import nearest  # which loads gymnasium

            hint = nearest(name, known)
        raise CommandError(message.rstrip(".") + (hint or ".")) from error


def with_config(words: list[str]) -> list[str]:
    """Put --config in front of a configuration file that is given bare."""
    return ["--config", *words] if words and not words[0].startswith("-") else words


def check_file(words: list[str]) -> None:
    """Refuse a configuration file that is not there, or is no plain YAML, in a line."""
    for flag, path in itertools.pairwise(words):
        if flag == "--config":
            read_yaml(path)


def _load(text: str) -> Any:
    """Return a value of a configuration, as jsonargparse reads YAML; also one of another file that it names."""
    check_bounds(text)
    return get_loader("yaml")(text)


def split(parser: ArgumentParser, words: list[str], config: type, options: type) -> tuple[Any, Any, str]:
    """Return the configuration, the options, and the configuration as YAML.

    Raises:
        CommandError: If a configuration file has set an option: it would allow itself what only a person may.
    """
    parsed = parse(parser, words)
    alone = parse_options(options, words)
    for one in fields(options):
        if getattr(parsed, one.name) != getattr(alone, one.name):
            raise CommandError(f"Expected {one.name} {ONLY_HERE}, got it in a configuration file.")
    names = [one.name for one in fields(options)]
    rest = Namespace(**{key: value for key, value in vars(parsed).items() if key not in (*names, "config")})
    built = parser.instantiate(rest)
    dumped = parser.dump(rest, format="yaml", skip_validation=True, skip_unset=False)  # null is no default
    chosen = {one.name: getattr(parsed, one.name) for one in fields(options)}
    return config(**{one.name: getattr(built, one.name) for one in fields(config)}), options(**chosen), dumped
