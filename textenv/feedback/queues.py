"""The next item and the progress of each rater, from counts whose cost does not grow with the size of the store."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from textenv.feedback.database import Database
from textenv.feedback.records import KINDS, Kind, Progress

GOLD_GAP = 10  # answers that a rater gives between the two showings of a gold item

# The state of one showing: its answer, if there is one, and whether a second showing of its gold item is still to come.
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
    """A rater's next question: the number of an unanswered showing, or of an item (shown again if `repeat` is 1)."""

    showing: int | None = None
    item: int | None = None
    repeat: int = 0


class Queues:
    """The order of items for each rater, kept in the tables of a store; use it inside `writing` or `reading`.

    An item is open until enough raters have answered it. A rater takes open items in the order of their numbers. Every
    open item up to the number in the column `last` was shown to the rater, or is listed in the table `passed` (other
    raters had it in hand, or it is open again because an answer was taken back). So items up to `last` are not searched
    again, and the number of items that are left is a sum of counts.

    Args:
        db: The store's tables.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, item: int, kind: str, gold: bool) -> None:
        """Register a new item."""
        self._count_open(kind, 1 + gold)

    def next(self, rater: str, kind: Kind | None, since: float) -> Next | None:
        """Return the rater's next question, or None.

        Args:
            rater: The rater's name.
            kind: The kind of question; None for any.
            since: A time in seconds since 1970: an item that was shown to another rater after it counts as being in
                that rater's hands.
        """
        kinds = _kinds(kind)
        # Last handed out first: an item whose answer was just taken back comes next.
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
        rows = [self._db.execute(f"{statement} LIMIT 1", (rater, kind)).fetchone() for kind in kinds]
        return [tuple(row) for row in rows if row is not None]

    def _is_due(self, rater: str, answer: int) -> bool:
        # At most GOLD_GAP rows are read, however many answers there are.
        later = "SELECT id FROM answers WHERE rater = ? AND stands AND id > ? LIMIT ?"
        return len(self._db.execute(later, (rater, answer, GOLD_GAP)).fetchall()) == GOLD_GAP

    def _fresh(self, rater: str, kinds: Iterable[str], since: float) -> int | None:
        """Return the first unseen item that is not in others' hands, or else the first unseen item, or None."""
        held = None
        # Each kind's rows come in the order of their numbers, so the merge is in that order, too.
        for item, answered, raters in heapq.merge(*(self._unseen(rater, kind) for kind in kinds)):
            if answered + self._db.execute(_HELD, (item, since)).fetchone()[0] < raters:
                return item
            held = item if held is None else held
        return held

    def _unseen(self, rater: str, kind: str) -> Iterator[tuple[int, int, int]]:
        yield from map(tuple, self._db.execute(f"{_PASSED} ORDER BY item", (rater, kind)))
        yield from map(tuple, self._db.execute(f"{_BEYOND} ORDER BY id", (kind, self._last(rater, kind), rater)))

    def _last(self, rater: str, kind: str) -> int:
        row = self._db.execute("SELECT last FROM raters WHERE rater = ? AND kind = ?", (rater, kind)).fetchone()
        return 0 if row is None else int(row["last"])

    def show(self, showing: int, item: int, rater: str, repeat: int) -> None:
        """Register a new showing."""
        kind, gold = self._db.execute("SELECT kind, gold FROM items WHERE id = ?", (item,)).fetchone()
        if repeat:
            first = "SELECT id FROM showings WHERE item = ? AND rater = ? AND repeat = 0"
            self._settle(self._db.execute(first, (item, rater)).fetchone()["id"])
        else:
            self._add(rater, kind, seen=1 + gold)
            self._db.execute("DELETE FROM passed WHERE rater = ? AND kind = ? AND item = ?", (rater, kind, item))
        self._settle(showing)

    def move_on(self, rater: str, item: int) -> None:
        """Raise the rater's `last` to an item that is about to be shown, and note the open items that it passes."""
        kind = self._db.execute("SELECT kind FROM items WHERE id = ?", (item,)).fetchone()["kind"]
        last = self._last(rater, kind)
        if item > last:
            between = self._db.execute(f"{_BEYOND} AND id < ?", (kind, last, rater, item)).fetchall()
            for row in between:
                self._db.insert("passed", rater=rater, kind=kind, item=row["id"])
            self._add(rater, kind, last=item - last)

    def answer(self, showing: int, kind: str, by: int = 1) -> None:
        """Register an answer, or, with `by` -1, that it was taken back.

        Args:
            showing: The showing that was answered.
            kind: The answer's kind, "skip" included.
            by: 1 or -1.
        """
        rater, asked, item = self._db.execute(
            "SELECT rater, kind, item FROM showings WHERE id = ?", (showing,)
        ).fetchone()
        self._add(rater, asked, **{"skipped" if kind == "skip" else "done": by})
        self._settle(showing)
        self._count_answered(item)

    def progress(self, rater: str, kind: Kind | None) -> Progress:
        """Return a rater's progress with a kind of question, or with all kinds for None."""
        done = skipped = left = 0
        for name in _kinds(kind):
            open_items = self._db.execute("SELECT n FROM open_items WHERE kind = ?", (name,)).fetchone()
            left += 0 if open_items is None else open_items["n"]
            row = self._db.execute("SELECT * FROM raters WHERE rater = ? AND kind = ?", (rater, name)).fetchone()
            if row is not None:  # left = open items + answers still owed - open items already seen
                done, skipped, left = done + row["done"], skipped + row["skipped"], left + row["owed"] - row["seen"]
        return Progress(done, skipped, left)

    def _settle(self, showing: int) -> None:
        """Update the columns of a showing: whether it is open, when its gold item is due, and the answers it owes."""
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
        """Count the raters who have answered an item, and update all other counts if this closes or reopens it."""
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
        """Add to a rater's counts."""
        self._db.execute("INSERT OR IGNORE INTO raters (rater, kind) VALUES (?, ?)", (rater, kind))
        sums = ", ".join(f"{name} = {name} + :{name}" for name in by)
        self._db.execute(
            f"UPDATE raters SET {sums} WHERE rater = :rater AND kind = :kind", {"rater": rater, "kind": kind, **by}
        )


def _kinds(kind: Kind | None) -> tuple[str, ...]:
    return KINDS if kind is None else (kind,)
