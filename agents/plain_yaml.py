"""YAML of a configuration, read with bounds on its size: a few lines of aliases can stand for more than fits memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .refusal import CommandError

MAX_BYTES = 1_000_000
MAX_NODES = 50_000  # each alias counts as all that it stands for
MAX_DEPTH = 64
MAX_NAMES = 1000  # of a list of names, each of which is tried as several types; lists in arguments may be longer
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str) -> str:
    """Return the text of a configuration file, which is plain YAML of keys and values.

    Raises:
        CommandError: If it is not there, too large, or something else.
    """
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise CommandError(f"Expected a configuration of at most {MAX_BYTES:,} bytes, got more in {path}.")
        text = data.decode()
    except OSError as error:
        raise CommandError(f"Expected a configuration file, got {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"Expected a configuration in UTF-8, got {path}: {error}.") from error
    try:
        check_bounds(text, path)
        found = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        raise CommandError(f"Expected plain YAML in {path}, got: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise CommandError(f"Expected keys and values in {path}, got {type(found).__name__}.")
    long = [key for part in (found, *found.values()) if isinstance(part, dict) for key in part if _is_long(part[key])]
    if long:
        raise CommandError(f"Expected at most {MAX_NAMES:,} names in a list of {path}, got more in {long[0]!r}.")
    return text


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and len(value) > MAX_NAMES


def check_bounds(text: str, where: str = "the configuration") -> None:
    r"""Raise CommandError for YAML of too many values, or too many within each other, before any of it is built.

    Example:
        >>> check_bounds("a: &a [1, 2]\nb: [*a, *a]")
    """
    sizes: dict[str, int] = {}  # values that an anchor stands for
    depths: dict[str, int] = {}  # and how deep they lie in each other
    total = 0
    levels = [("", 0, 0)]  # of each open collection: its anchor, the values before it, and the deepest in it
    for event in yaml.parse(text, Loader):
        depth = 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise CommandError(f"Expected plain YAML in {where}, got {event.anchor!r}, which contains itself.")
            total, depth = total + sizes[event.anchor], depths[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            sizes[event.anchor], depths[event.anchor] = 1, 1
        elif isinstance(event, yaml.CollectionStartEvent):
            levels.append((event.anchor, total, 1))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, depth = levels.pop()
            sizes[anchor], depths[anchor] = total - before, depth
        else:
            continue
        if not isinstance(event, yaml.CollectionStartEvent):
            anchor, before, deepest = levels[-1]
            levels[-1] = (anchor, before, max(deepest, depth + 1))
        if total > MAX_NODES:
            raise CommandError(f"Expected at most {MAX_NODES:,} values in {where}, got more, aliases written out.")
        if len(levels) + depth > MAX_DEPTH:
            raise CommandError(f"Expected values at most {MAX_DEPTH} deep in {where}, got deeper ones.")
