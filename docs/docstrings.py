"""Docstrings as Markdown: what mkdocstrings would otherwise not understand of ours."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import griffe

BORDER = re.compile(r"^ *=+(?: +=+)+ *$", flags=re.MULTILINE)


class Readable(griffe.Extension):
    """Rewrites the docstrings of all objects before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = with_tables(with_examples(obj.docstring.value))


def with_examples(text: str) -> str:
    """Return a docstring whose section "Example:" has the name under which griffe looks for doctests."""
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)


def with_tables(text: str) -> str:
    """Return a docstring whose tables of reStructuredText, with borders of "=", are tables of Markdown."""
    lines = text.split("\n")
    borders = [i for i, line in enumerate(lines) if BORDER.match(line)]
    for top, middle, bottom in reversed(list(zip(borders[::3], borders[1::3], borders[2::3], strict=False))):
        starts = [mark.start() for mark in re.finditer(r"=+", lines[top])]
        columns = [slice(begin, end) for begin, end in pairwise([*starts, None])]
        rows = [[line[column].strip() for column in columns] for line in lines[top + 1 : middle]]
        rows.append(["---"] * len(columns))
        rows += [[line[column].strip() for column in columns] for line in lines[middle + 1 : bottom]]
        indent = " " * starts[0]
        lines[top : bottom + 1] = [f"{indent}| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
