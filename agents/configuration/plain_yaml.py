"""The bounded reader of configuration files: a few lines of YAML aliases can expand to more than memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import CommandError

# The bounds are far above any real configuration (the largest example has 77 keys and values) and cost seconds at most.
MAX_BYTES = 1_000_000
MAX_NODES = 50_000  # values in a file; an alias counts as all the values of its anchor
MAX_DEPTH = 64  # nested collections
MAX_NAMES = 1000  # names in a list, since jsonargparse tries several types for each; lists in `args` may be longer
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be built without libyaml, which is faster


def read_yaml(path: str) -> str:
    """Return the text of a configuration file, checked to be plain YAML of keys and values.

    Raises:
        CommandError: If the file does not exist, is too large or is not such YAML.
    """
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)  # one more than allowed shows that the file is too large
        if len(data) > MAX_BYTES:
            raise CommandError(f"Expected a configuration of at most {MAX_BYTES:,} bytes, got more in {path}.")
        text = data.decode()
    except OSError as error:
        raise CommandError(f"Expected a configuration file, got {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"Expected a configuration in UTF-8, got {path}: {error}.") from error
    try:
        check_bounds(text, path)
        values = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-99-99
        raise CommandError(f"Expected plain YAML in {path}, got: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise CommandError(f"Expected keys and values in {path}, got {type(values).__name__}.")
    groups = [group for group in (values, *values.values()) if isinstance(group, dict)]
    long = [key for group in groups for key in group if _is_long(group[key])]
    if long:
        raise CommandError(f"Expected at most {MAX_NAMES:,} names in a list of {path}, got more in {long[0]!r}.")
    return text


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and len(value) > MAX_NAMES


def check_bounds(text: str, where: str = "the configuration") -> None:
    r"""Check that YAML has neither too many values nor too deeply nested ones, before any of it is built.

    Args:
        text: The YAML.
        where: The name of the text, for the message.

    Raises:
        CommandError: If it has, or if an anchor contains itself.

    Example:
        >>> check_bounds("a: &a [1, 2]\nb: [*a, *a]")
    """
    sizes: dict[str, int] = {}  # by anchor: the number of values that it stands for
    depths: dict[str, int] = {}  # by anchor: the depth of their nesting
    total = 0
    # For each open collection: its anchor, the total before it, and the largest depth in it so far.
    levels = [("", 0, 0)]
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
