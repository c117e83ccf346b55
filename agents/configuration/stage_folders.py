"""The check for folders that a configuration needs and an earlier command makes; its top comment has the command."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import CommandError


def check_folders(words: Sequence[str], config: Any) -> None:
    """Refuse a configuration with a missing folder, if a comment names the command that makes it.

    The comment may be in the configuration file, or in another .yml file of its folder.

    Args:
        words: The command's words after the verb, with --config before the file.
        config: The configuration that was read.

    Raises:
        CommandError: With the folder and the command.
    """
    files = [Path(path) for flag, path in itertools.pairwise(words) if flag == "--config"]
    makers: dict[str, str] = {}
    for file in files:
        for sibling in (file, *sorted(file.parent.glob("*.yml"))):
            for folder, command in made_by(sibling.read_text(encoding="utf-8")).items():
                makers.setdefault(folder, command)
    named = asdict(config)
    named.pop("out")  # which this command itself makes
    texts = set(_texts(named))
    for folder, command in makers.items():  # in the order of the comments, so that the first missing stage is named
        if folder in texts and not Path(folder).exists():
            raise CommandError(f"Expected the folder {folder}, got none: first run {command}")


def made_by(text: str) -> dict[str, str]:
    r"""Return the command that makes each folder, from the comment at the top of a configuration's text.

    Example:
        >>> made_by("# Two steps.\n#   textenv sft --data FILE \\\n#       --out runs/tuned\n")
        {'runs/tuned': 'textenv sft --data FILE --out runs/tuned'}
    """
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    # A backslash at a line's end joins it with the next, as in a shell.
    comment = re.sub(r"\\\n\s*", "", "\n".join(line[1:] for line in lines))
    makers = {}
    for command in re.findall(r"^ +(textenv .*)$", comment, flags=re.MULTILINE):
        for flag, folder in itertools.pairwise(shlex.split(command)):
            if flag == "--out":
                makers[folder] = command.strip()
    return makers


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
