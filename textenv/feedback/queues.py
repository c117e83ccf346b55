"""Which item comes next, and how far a rater is: kept as counts, so that it costs the same in a store of any size."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from textenv.feedback.database import Database
from textenv.feedback.records import KINDS, Kind, Progress

GOLD_GAP = 10  # answers of a rater between the two times that a gold item is shown

# What a showing still asks of its rater: the answer, and that to the second showing of a gold item.
_STATE = """
SELECT showings.rater, showings.kind, owed, answers.id AS answer, answers.kind AS given,
    gold AND NOT repeat AND NOT EXISTS (
        SELECT 1 FROM showings AS again
        WHERE again.item = items.id AND again.rater = showings.rater AND again.repeat = 1
    ) AS comes_again
FROM showings JOIN items ON items.id = item LEFT JOIN answers ON showing = showings.id AND stands
WHERE showings.id = ?
"""
_ANSWERED = """
SELECT count(DISTINCT showings.rater) FROM showings JOIN answers ON showing = showings.id
WHERE item = ? AND stands AND answers.kind != 'skip'
"""
_HELD = "SELECT count(*) FROM showings WHERE item = ? AND handed > ? AND is_open"
_PASSED = "SELECT item AS id, answered, raters FROM passed JOIN items ON id = item WHERE rater = ? AND passed.kind = ? "
_BEYOND = """
SELECT id, answered, raters FROM items WHERE kind = ? AND answered < raters AND id > ?
    AND NOT EXISTS (SELECT 1 FROM showings WHERE item = items.id AND rater = ?)
"""


class Next(NamedTuple):
    """What a rater gets next: a showing that is not answered, or else an item, for the first or the second time."""

    showing: int | None = None
    item: int | None = None
    repeat: int = 0


class Queues:
    """Keeps the order of items for each rater, as the tables of a store tell it; within `writing` or `reading`.

    An item is open until enough raters have answered it. Raters take open items by their numbers, so each has an end up
    to which all open items were shown to them or `passed`: because others had them in hand, or because they are open
    again since an answer was taken back. Nothing below that end is looked at again, and what is left is counted.

    Args:
        db: The tables.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, item: int, kind: str, gold: bool) -> None:
        """Take up an item that is new."""
        self._count_open(kind, 1 + gold)

    def next(self, rater: str, kind: Kind | None, since: float) -> Next | None:
        """Return what the rater gets next.

        Args:
            rater: Who is asked.
            kind: What is asked; None for any.
            since: What was handed to others after this time is in their hands.
        """
        kinds = _kinds(kind)
        waiting = "SELECT handed, id FROM showings WHERE rater = ? AND kind = ? AND is_open ORDER BY 1 DESC, 2 DESC"
        unanswered = self._first(waiting, rater, kinds)
        if unanswered:
            return Next(showing=max(unanswered)[1])
        due = self._first(
            "SELECT due, item FROM showings WHERE rater = ? AND kind = ? AND due > 0 ORDER BY 1", rater, kinds
        )
        fresh = self._fresh(rater, kinds, since)
        if due and (fresh is None or self._is_due(rater, min(due)[0])):
            return Next(item=min(due)[1], repeat=1)
        return None if fresh is None else Next(item=fresh)

    def _first(self, statement: str, rater: str, kinds: Iterable[str]) -> list[tuple[Any, int]]:
        found = [self._db.execute(f"{statement} LIMIT 1", (rater, kind)).fetchone() for kind in kinds]
        return [tuple(row) for row in found if row is not None]

    def _is_due(self, rater: str, answer: int) -> bool:
        later = "SELECT id FROM answers WHERE rater = ? AND stands AND id > ? LIMIT ?"
        return len(self._db.execute(later, (rater, answer, GOLD_GAP)).fetchall()) == GOLD_GAP

    def _fresh(self, rater: str, kinds: Iterable[str], since: float) -> int | None:
        """Return the first item that the rater has not seen; those in others' hands last."""
        held = None
        for item, answered, raters in heapq.merge(*(self._unseen(rater, kind) for kind in kinds)):
            if answered + self._db.execute(_HELD, (item, since)).fetchone()[0] < raters:
                return item
            held = item if held is None else held
        return held

    def _unseen(self, rater: str, kind: str) -> Iterator[tuple[int, int, int]]:
        yield from map(tuple, self._db.execute(f"{_PASSED} ORDER BY item", (rater, kind)))
        yield from map(tuple, self._db.execute(f"{_BEYOND} ORDER BY id", (kind, self._end(rater, kind), rater)))

    def _end(self, rater: str, kind: str) -> int:
        row = self._db.execute("SELECT last FROM raters WHERE rater = ? AND kind = ?", (rater, kind)).fetchone()
        return 0 if row is None else int(row["last"])

    def show(self, showing: int, item: int, rater: str, repeat: int) -> None:
        """Take up a showing that is new."""
        kind, gold = self._db.execute("SELECT kind, gold FROM items WHERE id = ?", (item,)).fetchone()
        if repeat:
            first = "SELECT id FROM showings WHERE item = ? AND rater = ? AND repeat = 0"
            self._settle(self._db.execute(first, (item, rater)).fetchone()["id"])
        else:
            self._add(rater, kind, seen=1 + gold)
            self._db.execute("DELETE FROM passed WHERE rater = ? AND kind = ? AND item = ?", (rater, kind, item))
        self._settle(showing)

    def move_on(self, rater: str, item: int) -> None:
        """Move the rater's end to an item that is about to be shown, where it is beyond."""
        kind = self._db.execute("SELECT kind FROM items WHERE id = ?", (item,)).fetchone()["kind"]
        end = self._end(rater, kind)
        if item > end:
            between = self._db.execute(f"{_BEYOND} AND id < ?", (kind, end, rater, item)).fetchall()
            for row in between:
                self._db.insert("passed", rater=rater, kind=kind, item=row["id"])
            self._add(rater, kind, last=item - end)

    def answer(self, showing: int, kind: str, by: int = 1) -> None:
        """Take up an answer, or, `by` -1, that one was taken back."""
        rater, about, item = self._db.execute(
            "SELECT rater, kind, item FROM showings WHERE id = ?", (showing,)
        ).fetchone()
        self._add(rater, about, **{"skipped" if kind == "skip" else "done": by})
        self._settle(showing)
        self._count_answered(item)

    def progress(self, rater: str, kind: Kind | None) -> Progress:
        """Return how far a rater is."""
        done = skipped = left = 0
        for one in _kinds(kind):
            wanted = self._db.execute("SELECT n FROM open_items WHERE kind = ?", (one,)).fetchone()
            left += 0 if wanted is None else wanted["n"]
            row = self._db.execute("SELECT * FROM raters WHERE rater = ? AND kind = ?", (rater, one)).fetchone()
            if row is not None:
                done, skipped, left = done + row["done"], skipped + row["skipped"], left + row["owed"] - row["seen"]
        return Progress(done, skipped, left)

    def _settle(self, showing: int) -> None:
        """Write down what a showing still asks of its rater, and when a gold item is due again."""
        row = self._db.execute(_STATE, (showing,)).fetchone()
        is_open = row["answer"] is None
        is_due = not is_open and row["comes_again"] and row["given"] != "skip"
        owed = 1 + row["comes_again"] if is_open else int(is_due)
        self._db.execute(
            "UPDATE showings SET is_open = ?, due = ?, owed = ? WHERE id = ?",
            (is_open, row["answer"] if is_due else 0, owed, showing),
        )
        self._add(row["rater"], row["kind"], owed=owed - row["owed"])

    def _count_answered(self, item: int) -> None:
        """Count who has answered an item; it may be open no more, or again."""
        row = self._db.execute("SELECT * FROM items WHERE id = ?", (item,)).fetchone()
        answered = self._db.execute(_ANSWERED, (item,)).fetchone()[0]
        self._db.execute("UPDATE items SET answered = ? WHERE id = ?", (answered, item))
        was_open, is_open = row["answered"] < row["raters"], answered < row["raters"]
        if was_open == is_open:
            return
        kind, by = row["kind"], (1 + row["gold"]) * (1 if is_open else -1)
        self._count_open(kind, by)
        viewers = [
            row["rater"] for row in self._db.execute("SELECT DISTINCT rater FROM showings WHERE item = ?", (item,))
        ]
        for rater in viewers:
            self._add(rater, kind, seen=by)
        if not is_open:
            self._db.execute("DELETE FROM passed WHERE item = ?", (item,))
            return
        for row in self._db.execute("SELECT rater FROM raters WHERE kind = ? AND last >= ?", (kind, item)).fetchall():
            if row["rater"] not in viewers:
                self._db.insert("passed", rater=row["rater"], kind=kind, item=item)

    def _count_open(self, kind: str, by: int) -> None:
        self._db.execute(
            "INSERT INTO open_items (kind, n) VALUES (?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n", (kind, by)
        )

    def _add(self, rater: str, kind: str, **by: int) -> None:
        """Add to the counts of a rater."""
        self._db.execute("INSERT OR IGNORE INTO raters (rater, kind) VALUES (?, ?)", (rater, kind))
        sums = ", ".join(f"{name} = {name} + :{name}" for name in by)
        self._db.execute(
            f"UPDATE raters SET {sums} WHERE rater = :rater AND kind = :kind", {"rater": rater, "kind": kind, **by}
        )


def _kinds(kind: Kind | None) -> tuple[str, ...]:
    return KINDS if kind is None else (kind,)
