"""The parsing of a verb's arguments by jsonargparse. Importing this does not load torch."""

from __future__ import annotations

import argparse
import itertools
import re
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)
from yaml import YAMLError

from ..configuration.config import ModelConfig, TrainConfig, TrustOptions, argument_help
from ..configuration.defaults import DEMO_PPO_SETTINGS, DEMO_SETTINGS, PPO_NAMES, default_settings
from ..configuration.plain_yaml import check_bounds, read_yaml
from ..configuration.values import WORDS, check_values, in_words
from ..errors import CommandError
from .help_groups import ONLY_HERE, regroup

MODE = "textenv"  # the name under which jsonargparse knows our loader: its own for YAML, after `check_bounds`


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help, with the types of values in plain words, as in our errors."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # The help string of jsonargparse ends with "(type: %(type)s, default: %(default)s)", or a part of that.
        text = super()._get_help_string(action).replace("type: %(type)s, default:", "%(type)s; default:")
        return text.replace("type: %(type)s", "%(type)s")

    def _get_type_str(self, action: argparse.Action) -> str | None:
        if not action.option_strings:  # RUN, DIR and the like
            return None
        kind = getattr(action, "_typehint", None) or action.type
        return in_words(kind) if kind in WORDS or get_args(kind) else super()._get_type_str(action)


def make_parser(
    verb: str, usage: str, config: type, options: type | None = None, does: str | None = None
) -> ArgumentParser:
    """Return a verb's parser, whose arguments are the fields of two dataclasses.

    Args:
        verb: The verb's name.
        usage: Its arguments, as the first line of help shows them. With "CONFIG" in it, the verb reads a YAML file.
        config: The dataclass whose fields a YAML file may set, too.
        options: The dataclass whose fields only the command line sets.
        does: The description in help; by default the first line of the docstring of `config`.
    """
    set_loader(MODE, _load, (YAMLError,))
    # jsonargparse imports and calls the class that a value names under the key `class_path`. A configuration may come
    # from anyone, so that it may name our own dataclass `Named` and nothing else.
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=["agents.Named", "agents.configuration.config.Named"],
        instantiate_subclass_spec_in_any=False,
    )
    parser = ArgumentParser(
        prog=f"textenv {verb}",
        usage=f"textenv {verb} {usage}",
        description=does or _first_line(config),
        formatter_class=HelpFormatter,
        exit_on_error=False,
        parser_mode=MODE,
        allow_abbrev=False,  # argparse would take --algorithm.n_env for --algorithm.n_envs
    )
    if "CONFIG" in usage:
        text = "A YAML file with any of these keys, which later arguments override; may come first, without --config."
        parser.add_argument("--config", action=ActionConfigFile, help=text, metavar="CONFIG.yml")
    parser.add_class_arguments(config, as_group=False, as_positional=True)
    helps = _helps(config)
    if options is not None:
        _add_options(parser.add_argument_group(ONLY_HERE), options)
    for action in parser._actions:  # argparse has no public list of them
        check_values(action)
        if action.dest in helps:
            action.help = helps[action.dest] + (_two_defaults(action.dest) if issubclass(config, TrainConfig) else "")
        elif action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS  # jsonargparse adds --env.help and the like; our help has all keys
        elif action.dest == "print_config":
            action.help = "Print all keys with the values that would be used, and exit."
            action.metavar = ""
    for group in parser._action_groups:
        config_class = getattr(group, "group_class", None)  # set by jsonargparse for a nested dataclass
        if config_class is not None:
            whole = next(action for action in parser._actions if action.dest == group.dest)  # --env and the like
            section = _first_line(config_class).rstrip(".")
            whole.metavar, whole.help = "{KEY: VALUE, ...}", f"{section}: several keys at once."
    regroup(parser, config)
    return parser


def _first_line(config: type) -> str:
    return (config.__doc__ or "").partition("\n")[0]


def _two_defaults(key: str) -> str:
    """Return the type and both defaults of a key whose default depends on the model, for its help; else nothing."""
    for settings, case in ((DEMO_SETTINGS, ""), (DEMO_PPO_SETTINGS, f" and {' or '.join(PPO_NAMES)}")):
        if key in settings:
            case += ", where that divides a rollout" if key == "algorithm.batch_size" else ""
            default = f'{settings[key]} with the model "{ModelConfig.name}"{case}; else %(default)s'
            return f" (%(type)s; default: {default})"
    return ""


def make_options_parser(options: type) -> argparse.ArgumentParser:
    """Return a parser of the options alone, which reads no configuration file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_options(parser, options)
    return parser


def parse_options(options: type, words: list[str]) -> argparse.Namespace:
    """Return a verb's options from the command line alone, whatever a configuration file has.

    Args:
        options: The dataclass of the options.
        words: The command's words after the verb; words that are not options are ignored.

    Raises:
        CommandError: If an option lacks its value, or has a value and takes none.
    """
    try:
        return make_options_parser(options).parse_known_args(words)[0]
    except argparse.ArgumentError as error:
        raise CommandError(f"{error}.") from error


def _add_options(group: Any, options: type) -> None:
    texts = argument_help(options)
    trust = {field.name for field in fields(TrustOptions)}
    for field in sorted(fields(options), key=lambda field: field.name in trust):  # in help, permissions come last
        flag = f"--{field.name}"
        kind = str(field.type)  # a string: `from __future__ import annotations` keeps annotations as their source
        both = dict.fromkeys((flag, flag.replace("_", "-")))
        if kind == "bool":
            group.add_argument(*both, action="store_true", help=texts[field.name])
        elif kind.startswith("list"):
            parsing = field.metadata or {"action": "append", "metavar": "NAME"}
            group.add_argument(*both, default=[], help=texts[field.name], **parsing)
        else:
            kinds = {"type": str, "metavar": field.name.upper(), **field.metadata}
            group.add_argument(flag, help=texts[field.name], **kinds)


def _helps(config: type, prefix: str = "") -> dict[str, str]:
    """Return the help of every argument of a dataclass and of the dataclasses nested in it, by dotted name."""
    texts = {f"{prefix}{name}": text for name, text in argument_help(config).items()}
    for name, kind in get_type_hints(config).items():
        if is_dataclass(kind) and isinstance(kind, type):
            texts |= _helps(kind, f"{prefix}{name}.")
    return texts


def parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    """Parse the command's words after the verb.

    Raises:
        CommandError: For an unknown key, with the nearest known one, and for a value of a wrong type.
    """
    try:
        return parser.parse_args(words)
    except (ArgumentError, ImportError) as error:  # ImportError: the denylist has refused an import
        known = [action.dest for action in parser._actions]
        message = " ".join(str(error).split())
        if denied := re.search(r"Importing '([^']*)' is not allowed, denied by", message):
            raise CommandError(
                f"Expected names, or keys and values, got the class {denied[1]!r}: id: module:Class, args: {{...}}."
            ) from error
        # jsonargparse names an unknown key in one of two ways, the second within a group.
        match = re.search(r"unrecognized arguments?: --([\w.]+)|(?:[Kk]ey|[Oo]ption) ['\"]([\w.]+)['\"]", message)
        group = re.search(r"Group '([\w.]+)'", message)
        name = (f"{group[1]}." if group else "") + (match[1] or match[2]) if match else ""
        hint = ""
        if name and name not in known:
            from textenv.checks.signatures import nearest  # which loads gymnasium

            # The file of a search is easily given to another verb.
            is_search = name.partition(".")[0] in ("tune", "trials") and "trials" not in known
            hint = ", since only textenv tune reads it: leave it out." if is_search else nearest(name, known)
        raise CommandError(message.rstrip(".") + (hint or ".")) from error


def with_config(words: list[str]) -> list[str]:
    """Return the words with --config before the first one, if that is a configuration file."""
    return ["--config", *words] if words and not words[0].startswith("-") else words


def check_file(words: list[str]) -> None:
    """Refuse a configuration file that does not exist, or is not plain YAML.

    Raises:
        CommandError: If it does not, or is not; jsonargparse has not read the file then.
    """
    for flag, path in itertools.pairwise(words):
        if flag == "--config":
            read_yaml(path)


def set_defaults(parser: ArgumentParser, words: list[str], given: TrainConfig) -> list[str]:
    """Give the parser the defaults that depend on other keys; return the words to parse with them.

    Args:
        parser: The verb's parser.
        words: The command's words after the verb.
        given: The configuration that they make without these defaults.
    """
    settings = default_settings(given)
    # The environment's arguments are a single value, whose default would be lost with the first one that is given.
    of_env = {key: settings.pop(key) for key in list(settings) if key.startswith("env.args.")}
    parser.set_defaults(settings)
    missing = {key: value for key, value in of_env.items() if key.removeprefix("env.args.") not in given.env.args}
    return [*words, *(f"--{key}={value}" for key, value in missing.items())]


def _load(text: str) -> Any:
    """Check the bounds of a value of the command line or of a file, and read it by jsonargparse's loader for YAML."""
    check_bounds(text)
    return get_loader("yaml")(text)


def split(parser: ArgumentParser, words: list[str], config: type, options: type) -> tuple[Any, Any, str]:
    """Parse the words; return the configuration, the options, and the configuration as YAML.

    Args:
        parser: The verb's parser.
        words: The command's words after the verb.
        config: The dataclass of the configuration.
        options: The dataclass of the options.

    Raises:
        CommandError: If a configuration file sets an option: a file must not give itself permissions.
    """
    parsed = parse(parser, words)
    alone = parse_options(options, words)
    names = [field.name for field in fields(options)]
    for name in names:
        if getattr(parsed, name) != getattr(alone, name):
            raise CommandError(f"Expected {name} {ONLY_HERE}, got it in a configuration file.")
    rest = Namespace(**{key: value for key, value in vars(parsed).items() if key not in (*names, "config")})
    built = parser.instantiate(rest)
    # skip_unset=False writes each null: a key that is left out would get its default again, which may not be null.
    dumped = parser.dump(rest, format="yaml", skip_validation=True, skip_unset=False)
    chosen = {name: getattr(parsed, name) for name in names}
    return config(**{field.name: getattr(built, field.name) for field in fields(config)}), options(**chosen), dumped
