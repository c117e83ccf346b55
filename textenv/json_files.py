"""JSON that may be damaged or made by others: what it must look like is checked once, where it is read."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

# A type (`float` takes whole numbers as well, `object` anything), None for null, a tuple of alternatives, [shape] for a
# list, or {key: shape} for an object: what other keys it has is free, or of one shape where `str` is the key.
Shape = Any

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
    wrong = _mismatch(value, shape, "")
    if wrong is not None:
        place, expected, got = wrong
        raise ValueError(f"Expected {expected}{f' as `{place}`' if place else ''} in {where}, got {got}.")
    return value


def _mismatch(value: Any, shape: Shape, place: str) -> tuple[str, str, str] | None:
    """Return the first place that is of another shape, with what was expected and what is there."""
    wrong = (place, _name(shape), f"{value!r:.60}")
    if isinstance(shape, tuple):
        return wrong if all(_mismatch(value, one, place) for one in shape) else None
    if isinstance(shape, list):
        found = (
            [_mismatch(one, shape[0], f"{place}[{i}]") for i, one in enumerate(value)] if _is(value, list) else [wrong]
        )
        return next(filter(None, found), None)
    if isinstance(shape, dict):
        if not _is(value, dict):
            return wrong
        above = f"{place}." if place else ""
        named = {key: one for key, one in shape.items() if key is not str}
        for key, one in named.items():
            if key not in value:
                return f"{above}{key}", _name(one), "nothing"
        shapes = {key: named.get(key, shape.get(str, object)) for key in value}
        return next(filter(None, (_mismatch(value[key], one, above + key) for key, one in shapes.items())), None)
    return None if _is(value, shape) else wrong


def _is(value: Any, kind: Any) -> bool:
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
