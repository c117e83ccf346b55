"""The rows of a feedback store as records: the statements that select them, and the reading of each."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from textenv.feedback.records import Answer, Item
from textenv.prompts.chat import Message

ITEM = """
SELECT item, showings.id AS showing, rater, places, items.kind, prompt, messages, low, high
FROM showings JOIN items ON items.id = item WHERE showings.id = ?
"""
# New answers that still count, and new undos of answers that a reader up to :since has already seen.
ANSWERS = """
SELECT answers.*, item, repeat, places, prompt, messages, run, low, high
FROM answers JOIN showings ON showings.id = showing JOIN items ON items.id = item
WHERE answers.id > :since AND (stands OR undoes <= :since) ORDER BY answers.id
"""


def read_item(row: sqlite3.Row, texts: Sequence[str]) -> Item:
    """Return the item of a row of `ITEM`.

    Args:
        row: The row.
        texts: The item's completions in the order in which they were added.
    """
    order = tuple(json.loads(row["places"]))
    return Item(
        **{name: row[name] for name in ("showing", "rater", "kind", "prompt")},
        id=row["item"],
        completions=tuple(texts[index] for index in order),
        order=order,
        scale=(row["low"], row["high"]),
        messages=_messages(row),
    )


def read_answer(row: sqlite3.Row, texts: Sequence[tuple[str, str | None]]) -> Answer:
    """Return the answer of a row of `ANSWERS`.

    Args:
        row: The row.
        texts: The item's completions, each with its model or None, in the order in which they were added.
    """
    value = json.loads(row["value"])
    return Answer(
        **{name: row[name] for name in ("id", "item", "kind", "rater", "prompt", "run", "repeat", "seconds", "time")},
        completions=tuple(text for text, _ in texts),
        models=tuple(model for _, model in texts),
        value=tuple(value) if isinstance(value, list) else value,
        scale=(row["low"], row["high"]),
        order=tuple(json.loads(row["places"])),
        undoes=row["undoes"],
        messages=_messages(row),
    )


def _messages(row: sqlite3.Row) -> tuple[Message, ...] | None:
    return None if row["messages"] is None else tuple(json.loads(row["messages"]))
