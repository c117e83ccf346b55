"""Reading of JSON files that may be damaged or hostile: their shape is checked once, when they are read."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

# A type (`float` takes whole numbers as well, `object` anything), None for null, a tuple of alternatives, [shape] for a
# list, or {key: shape} for an object. An object may have further keys; the entry under the key `str`, if there is one,
# is the shape of their values. A key may be missing if NOTHING is among the alternatives of its value.
Shape = Any

NOTHING = object()  # the value of a missing key
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object"}


def read_json(path: str | PathLike[str], shape: Shape = object) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file.
        shape: The shape that the value must have, such as `{"tokens": int, "figures": {str: (float, None)}}`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is not JSON, or of another shape; the message names the file and the key.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "best.json"
        ...     n_chars = file.write_text('{"figure": "recall", "value": 0.9}')
        ...     read_json(file, {"figure": str, "value": float})["value"]
        0.9
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"), shape, str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected JSON in {path}, got bytes that are no UTF-8 ({error.reason}).") from error


def parse_json(text: str, shape: Shape, where: str) -> Any:
    """Return the value of a JSON text, with the check of its shape that `read_json` makes for a file.

    Args:
        text: The JSON text.
        shape: The shape that the value must have.
        where: The origin of the text, as errors name it.

    Raises:
        ValueError: If the text is not JSON, or of another shape.

    Example:
        >>> parse_json('{"tokens": "8"}', {"tokens": int}, "line 1 of metrics.jsonl")
        Traceback (most recent call last):
        ValueError: Expected a whole number as `tokens` in line 1 of metrics.jsonl, got '8'.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {where}, got {text[:40]!r} ({error}).") from error
    mismatch = next(_mismatches(value, shape, ""), None)
    if mismatch is not None:
        key, expected, got = mismatch
        at = f" as `{key}`" if key else ""
        shown = "nothing" if got is NOTHING else reprlib.repr(got)
        raise ValueError(f"Expected {_name(expected)}{at} in {where}, got {shown}.")
    return value


def _mismatches(value: Any, shape: Shape, path: str) -> Iterator[tuple[str, Shape, Any]]:
    """Yield the path, the expected shape and the value of each part of `value` that is of another shape."""
    if isinstance(shape, tuple):
        if all(any(_mismatches(value, alternative, path)) for alternative in shape):
            yield path, shape, value
    elif isinstance(shape, (list, dict)) and not isinstance(value, type(shape)):
        yield path, shape, value
    elif isinstance(shape, list):
        for i, item in enumerate(value):
            yield from _mismatches(item, shape[0], f"{path}[{i}]")
    elif isinstance(shape, dict):
        for key in {**shape, **value}:
            expected = shape.get(key, shape.get(str, object))
            if key is not str:
                yield from _mismatches(value.get(key, NOTHING), expected, f"{path}.{key}" if path else key)
    elif not _is_of(value, shape):
        yield path, shape, value


def _is_of(value: Any, kind: Any) -> bool:
    if value is NOTHING or kind is NOTHING:
        return value is kind
    if kind is None or value is None:
        return value is None and kind in (None, object)
    if isinstance(value, bool):  # `isinstance(True, int)` holds in Python, but JSON's true is no number
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def _name(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_name, shape))
    if shape is None or shape is NOTHING:
        return "null" if shape is None else "nothing"
    kind = shape if isinstance(shape, type) else type(shape)
    return NAMES.get(kind, "a list" if kind is list else "a value")
