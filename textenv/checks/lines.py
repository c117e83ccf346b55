"""Reading of untrusted text, JSON and CSV files, with bounded lengths and errors that name file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TextIO

MAX_CHARS = 4_000_000  # of a line or a cell: about a million tokens, more than any prompt has


def read_lines(path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line that is not blank.

    Raises:
        ValueError: If a line is longer than 4,000,000 characters, or the file is not UTF-8.
    """
    with _reading(path) as stream:
        yield from ((number, line) for number, line in numbered(stream, path) if line.strip())


def numbered(stream: TextIO, path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of an open file, without its newline.

    Args:
        stream: The open file.
        path: The file's name, for errors.

    Raises:
        ValueError: If a line is longer than 4,000,000 characters.
    """
    number = 0
    while line := stream.readline(MAX_CHARS + 1):
        number += 1
        line = line.removesuffix("\n")
        if len(line) > MAX_CHARS:
            raise ValueError(
                f"Expected lines of at most {MAX_CHARS:,} characters, got a longer one: line {number} of "
                f"{fspath(path)!r}."
            )
        yield number, line


def read_csv(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a CSV file as dictionaries from column to cell; its first line names the columns.

    Raises:
        ValueError: If a cell is longer than 4,000,000 characters, or a row has more cells than the header.
    """
    previous_limit = csv.field_size_limit(MAX_CHARS)  # holds for the whole process, hence the `finally`
    try:
        with _reading(path, newline="") as stream:
            reader = csv.DictReader(stream)
            rows: list[dict[str, Any]] = []
            while True:
                where = f"row {len(rows) + 1} of {fspath(path)!r}, after its line {reader.line_num}"
                try:
                    row = next(reader)
                except StopIteration:
                    return rows
                except csv.Error as error:
                    raise ValueError(
                        f"Expected cells of at most {MAX_CHARS:,} characters, with their quotes closed, got {error} in "
                        f"{where}."
                    ) from error
                if None in row:  # csv.DictReader puts surplus cells under the key None
                    raise ValueError(f"Expected {len(row) - 1} cells, as the header has, got more in {where}.")
                rows.append(row)
    finally:
        csv.field_size_limit(previous_limit)


def read_json(line: str, where: str) -> Any:
    """Return the value of a line of JSON.

    Args:
        line: The JSON text.
        where: The origin of the line, as errors name it, such as "line 3 of 'prompts.jsonl'".

    Raises:
        ValueError: If the line is not JSON, or nested too deeply.

    Example:
        >>> read_json('{"prompt": "It was"}', "line 1")
        {'prompt': 'It was'}
    """
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError(f"Expected JSON on {where}, got one that is too deep to read.") from error
    except ValueError as error:
        raise ValueError(f"Expected JSON on {where}: {error}.") from error


@contextmanager
def _reading(path: str | PathLike[str], newline: str | None = None) -> Iterator[TextIO]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 in {fspath(path)!r}: {error}.") from error
