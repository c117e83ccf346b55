"""JSON that may be damaged or made by others: what it must look like is checked once, where it is read."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

# A type (`float` takes whole numbers as well, `object` anything), None for null, a tuple of alternatives, [shape] for a
# list, or {key: shape} for an object: what other keys it has is free, or of one shape where `str` is the key.
Shape = Any

NOTHING = object()  # what stands at a key that is not there
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object"}


def read_json(path: str | PathLike[str], shape: Shape = object) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.
        shape: What it must look like: `{"tokens": int, "figures": {str: (float, None)}}`, for example.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON, or of another shape; the message names the file and the place in it.

    Example:
        >>> # read_json("runs/mine/best/best.json", {"figure": str, "value": float})["value"]
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"), shape, str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected JSON in {path}, got bytes that are no UTF-8 ({error.reason}).") from error


def parse_json(text: str, shape: Shape, where: str) -> Any:
    """Return what a text of JSON holds, as `read_json` does.

    Args:
        text: The text.
        shape: What it must look like.
        where: Where it stands, for messages.

    Raises:
        ValueError: If it is no JSON, or of another shape.

    Example:
        >>> parse_json('{"tokens": "8"}', {"tokens": int}, "line 1 of metrics.jsonl")
        Traceback (most recent call last):
        ValueError: Expected a whole number as `tokens` in line 1 of metrics.jsonl, got '8'.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {where}, got {text[:40]!r} ({error}).") from error
    wrong = next(_mismatches(value, shape, ""), None)
    if wrong is not None:
        place, expected, got = wrong
        at = f" as `{place}`" if place else ""
        shown = "nothing" if got is NOTHING else reprlib.repr(got)
        raise ValueError(f"Expected {_name(expected)}{at} in {where}, got {shown}.")
    return value


def _mismatches(value: Any, shape: Shape, place: str) -> Iterator[tuple[str, Shape, Any]]:
    """Give each place that is of another shape, the shape that was expected, and what is there."""
    if isinstance(shape, tuple):
        if all(any(_mismatches(value, one, place)) for one in shape):
            yield place, shape, value
    elif isinstance(shape, (list, dict)) and not isinstance(value, type(shape)):
        yield place, shape, value
    elif isinstance(shape, list):
        for i, one in enumerate(value):
            yield from _mismatches(one, shape[0], f"{place}[{i}]")
    elif isinstance(shape, dict):
        for key in {**shape, **value}:
            expected = shape.get(key, shape.get(str, object))
            if key is not str:
                yield from _mismatches(value.get(key, NOTHING), expected, f"{place}.{key}" if place else key)
    elif not _is(value, shape):
        yield place, shape, value


def _is(value: Any, kind: Any) -> bool:
    if value is NOTHING:
        return False
    if kind is None or value is None:
        return value is None and kind in (None, object)
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def _name(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_name, shape))
    if shape is None:
        return "null"
    kind = shape if isinstance(shape, type) else type(shape)
    return NAMES.get(kind, "a list" if kind is list else "a value")
