"""Reading of untrusted text, JSON and CSV files, with bounded lengths and errors that name file and line."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TextIO

MAX_CHARS = 4_000_000  # of a line or a cell: about a million tokens, more than any prompt has
BYTE_ORDER_MARK = "\ufeff"  # the first character of many files that Windows programs write


def read_lines(path: str | PathLike[str], encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line that is not blank.

    Args:
        path: The file.
        encoding: The file's encoding; a byte order mark is no part of the first line.

    Raises:
        ValueError: If a line is longer than 4,000,000 characters or has a NUL character, or the file has another
            encoding.
    """
    with _reading(path, encoding) as stream:
        for number, line in numbered(stream, path):
            _check_no_nul(line, f"line {number} of {fspath(path)!r}")
            if line.strip():
                yield number, line


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


def read_csv(path: str | PathLike[str], encoding: str = "utf-8") -> list[dict[str, Any]]:
    """Return the rows of a CSV file as dictionaries from column to cell; its first line names the columns.

    Args:
        path: The file.
        encoding: The file's encoding; a byte order mark is no part of the first column's name.

    Raises:
        ValueError: If a cell is longer than 4,000,000 characters or has a NUL character, a row has more cells than the
            header, or the file has another encoding.
    """
    previous_limit = csv.field_size_limit(MAX_CHARS)  # holds for the whole process, hence the `finally`
    try:
        with _reading(path, encoding, newline="") as stream:
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
                    raise ValueError(
                        f"Expected {len(row) - 1} cells, as the header has, got more in row {len(rows) + 1} of "
                        f"{fspath(path)!r}, line {reader.line_num}: put a cell with a comma in double quotes."
                    )
                _check_no_nul("".join(filter(None, row.values())), f"row {len(rows) + 1} of {fspath(path)!r}")
                rows.append(row)
    finally:
        csv.field_size_limit(previous_limit)


def read_list(path: str | PathLike[str], encoding: str = "utf-8") -> list[Any]:
    """Return the list that a JSON file holds.

    Args:
        path: The file.
        encoding: The file's encoding.

    Raises:
        ValueError: If the file is not JSON, holds anything but a list, or has another encoding.
    """
    cure = "A file with a JSON value on each line ends in .jsonl."
    with _reading(path, encoding) as stream:
        text = stream.read()
    _check_no_nul(text, repr(fspath(path)))
    try:
        rows = read_json(text, repr(fspath(path)))
    except ValueError as error:
        raise ValueError(f"{error} {cure}") from error
    if not isinstance(rows, list):
        raise ValueError(f"Expected a list of rows in {fspath(path)!r}, got {rows!r:.80}. {cure}")
    return rows


def check_encodable(text: str, where: str) -> None:
    """Raise ValueError for a text with a lone surrogate, half of an emoji, which no tokenizer can encode.

    Args:
        text: The text.
        where: The text as the error names it, such as "prompt 3".

    Raises:
        ValueError: If UTF-8 cannot write the text.

    Example:
        >>> check_encodable("a whole 🙂", "prompt 3")
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"Expected whole characters in {where}, got a lone surrogate in {near!r}: leave the row out, or write "
            'text.encode("utf-8", "replace").decode().'
        ) from error


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


def _check_no_nul(text: str, where: str) -> None:
    # Without a byte order mark, the ASCII characters of UTF-16 are valid UTF-8, each beside a NUL.
    if "\0" in text:
        raise ValueError(
            f"Expected text in {where}, got a NUL character, as UTF-16 has if it is read as UTF-8: name the encoding, "
            "as in encoding='utf-16-le'."
        )


@contextmanager
def _reading(path: str | PathLike[str], encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    with Path(path).open("rb") as file:
        try:
            stream = TextIOWrapper(file, encoding, newline=newline)
        except LookupError as error:
            raise ValueError(
                f"Expected `encoding` to be a name that Python knows, such as 'utf-8' or 'gb18030', got {encoding!r}."
            ) from error
        try:
            if stream.read(1) != BYTE_ORDER_MARK:
                stream.seek(0)
            yield stream
        except UnicodeError as error:
            # A text stream decodes far ahead of the line that it returns, so that the bytes are decoded again.
            end = file.tell()
            file.seek(0)
            raise ValueError(_undecodable(file.read(end), path, encoding)) from error


def _undecodable(content: bytes, path: str | PathLike[str], encoding: str) -> str:
    """Return what to say of the start of a file that is not of the encoding."""
    start = 0  # of UTF-16 without a byte order mark, which only a stream refuses
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        start = error.start
    line = len(re.findall(r"\r\n?|\n", content[:start].decode(encoding, "replace"))) + 1
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    names = "encoding='utf-16'" if is_utf16 else "encoding='gb18030' (Chinese) or encoding='cp1252' (Windows)"
    return (
        f"Expected {encoding.upper()} in {fspath(path)!r}, got the byte {content[start]:#04x} in line {line}: save the "
        f"file as UTF-8, or name its encoding, as in {names}."
    )
