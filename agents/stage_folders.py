"""The folders that a configuration reads and an earlier command makes: the commands stand in opening comments."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .refusal import CommandError


def check_folders(words: Sequence[str], config: Any) -> None:
    """Refuse a configuration that names a folder which is not there, where a comment has the command that makes it.

    Args:
        words: What stands behind the verb, with --config before the file.
        config: The configuration that was read.

    Raises:
        CommandError: With the folder and the command.
    """
    files = [Path(path) for flag, path in itertools.pairwise(words) if flag == "--config"]
    makers: dict[str, str] = {}
    for file in files:
        for one in (file, *sorted(file.parent.glob("*.yml"))):
            for folder, command in made_by(one.read_text(encoding="utf-8")).items():
                makers.setdefault(folder, command)
    named = asdict(config)
    named.pop("out")
    texts = set(_texts(named))
    for folder, command in makers.items():  # in the order of the commands
        if folder in texts and not Path(folder).exists():
            raise CommandError(f"Expected the folder {folder}, got none: first run {command}")


def made_by(text: str) -> dict[str, str]:
    r"""Return the command that makes each folder, as the opening comment of a configuration has them.

    Example:
        >>> made_by("# Two steps.\n#   textenv sft --data FILE \\\n#       --out runs/tuned\n")
        {'runs/tuned': 'textenv sft --data FILE --out runs/tuned'}
    """
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = re.sub(r"\\\n\s*", "", "\n".join(line[1:] for line in lines))
    found = {}
    for command in re.findall(r"^ +(textenv .*)$", comment, flags=re.MULTILINE):
        for flag, folder in itertools.pairwise(shlex.split(command)):
            if flag == "--out":
                found[folder] = command.strip()
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
