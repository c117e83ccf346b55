"""The queues of a feedback store: the next item and the progress equal those of slow queries over all rows."""

import random

import pytest

from textenv.feedback import store as store_module
from textenv.feedback.records import KINDS, SIZES, Record
from textenv.feedback.store import FeedbackStore

OPEN = """
SELECT item, repeat, 1 + (gold AND NOT repeat AND NOT EXISTS (
    SELECT 1 FROM showings AS again WHERE again.item = items.id AND again.rater = :rater AND again.repeat = 1)) AS n
FROM showings JOIN items ON items.id = item
WHERE rater = :rater AND items.kind = coalesce(:kind, items.kind)
    AND NOT EXISTS (SELECT 1 FROM answers WHERE showing = showings.id AND stands)
ORDER BY handed DESC, showings.id DESC
"""
AGAIN = """
SELECT items.id AS item, 1 AS repeat, 1 AS n,
    (SELECT count(*) FROM answers AS later JOIN showings AS other ON other.id = later.showing
        WHERE other.rater = :rater AND later.stands AND later.id > answers.id) AS since
FROM items JOIN showings ON item = items.id JOIN answers ON showing = showings.id
WHERE gold AND showings.rater = :rater AND stands AND answers.kind != 'skip'
    AND items.kind = coalesce(:kind, items.kind)
    AND NOT EXISTS (SELECT 1 FROM showings WHERE item = items.id AND rater = :rater AND repeat = 1)
ORDER BY answers.id
"""
FRESH = """
SELECT items.id AS item, 0 AS repeat, 1 + gold AS n,
    (SELECT count(DISTINCT showings.rater) FROM showings JOIN answers ON showing = showings.id
        WHERE item = items.id AND stands AND answers.kind != 'skip') AS given,
    (SELECT count(*) FROM showings WHERE item = items.id AND handed > :since
        AND NOT EXISTS (SELECT 1 FROM answers WHERE showing = showings.id AND stands)) AS held
FROM items WHERE kind = coalesce(:kind, kind) AND given < raters
    AND NOT EXISTS (SELECT 1 FROM showings WHERE item = items.id AND rater = :rater)
ORDER BY given + held >= raters, items.id
"""
COUNTS = """
SELECT answers.kind = 'skip', count(*) FROM answers JOIN showings ON showings.id = showing JOIN items ON items.id = item
WHERE showings.rater = :rater AND stands AND items.kind = coalesce(:kind, items.kind) GROUP BY 1
"""


class Clock:
    """A clock that advances with each reading, so that no two events have the same time."""

    def __init__(self):
        self.now = 1e6

    def time(self):
        self.now += 1
        return self.now


def slowly(store, rater, kind, now):
    """Return the next item, as (item, repeat), and the progress, both computed from all rows."""
    asked = {"rater": rater, "kind": kind, "since": now - store_module.LEASE}
    with store._db.reading():
        waiting, again, fresh = (store._db.execute(query, asked).fetchall() for query in (OPEN, AGAIN, FRESH))
        counts = dict(store._db.execute(COUNTS, asked).fetchall())
    left = sum(row["n"] for row in [*waiting, *again, *fresh])
    due = [row for row in again if row["since"] >= 10 or not fresh][:1]
    first = next(iter([*waiting[:1], *due, *fresh[:1]]), None)
    return first and (first["item"], first["repeat"]), (counts.get(0, 0), counts.get(1, 0), left)


def answer(store, shown, draw):
    if draw.random() < 0.15:
        store.skip(shown)
    elif shown.kind == "score":
        store.score(shown, [draw.randint(1, 5) for _ in shown.order])
    elif shown.kind == "compare":
        store.choose(shown, draw.choice(["a", "b", "tie"]))
    else:
        store.rank(shown, draw.sample(range(len(shown.order)), len(shown.order)))


def add(store, draw):
    kind = draw.choice(KINDS)
    n = draw.randint(*SIZES[kind])
    store.add("p", ["x"] * n, kind, raters=draw.choice([1, 1, 2, 3]), gold=draw.random() < 0.3)


@pytest.mark.parametrize("seed", range(4))
def test_next_item_and_progress_equal_the_slow_queries(seed, tmp_path, monkeypatch):
    draw, clock = random.Random(seed), Clock()
    monkeypatch.setattr(store_module, "time", clock)
    monkeypatch.setattr(store_module, "LEASE", draw.choice([10.0, 40.0, 1e5]))
    repeats = 0
    with FeedbackStore(tmp_path / "answers.db", seed=seed) as store:
        store._db.execute("PRAGMA synchronous=OFF")
        for _ in range(25):
            add(store, draw)
        for _ in range(250):
            rater, kind = draw.choice(["ann", "bob", "cy", "dee"]), draw.choice([None, None, *KINDS])
            action = draw.random()
            if action < 0.1:
                add(store, draw)
            elif action < 0.25:
                store.undo(rater)
            elif action < 0.3:
                store.record([Record("score", "p", ["x"], [2], rater)])
            else:
                wanted, _ = slowly(store, rater, kind, clock.now + 1)
                shown = store.next(rater, kind)
                repeat = shown and store._db.execute("SELECT repeat FROM showings WHERE id = ?", (shown.showing,))
                assert (shown and (shown.id, repeat.fetchone()["repeat"])) == wanted
                repeats += bool(wanted and wanted[1])
                if shown is not None and draw.random() < 0.8:
                    answer(store, shown, draw)
            for name, asked in ((rater, kind), ("ann", None)):
                assert store.progress(name, asked) == slowly(store, name, asked, clock.now)[1]
    assert repeats > 3


def test_an_answer_costs_the_same_with_many_items(tmp_path):
    """Count SQLite's virtual-machine steps for an answer, in stores of 40 and of 800 items that all stay open."""
    steps = {}
    for n in (40, 800):
        with FeedbackStore(tmp_path / f"{n}.db", seed=0) as store:
            connection = store._db._connection
            connection.execute("PRAGMA synchronous=OFF")
            with store._db.writing():
                for number in range(n):
                    store._add(f"{number}", ["x", "y"], "compare", None, None, raters=2, gold=number % 4 == 0)
            for _ in range(n - 12):
                store.choose(store.next("ann"), "a")
            store.skip(store.next("ann"))
            count = 0

            def step():
                nonlocal count
                count += 1

            connection.set_progress_handler(step, 1)
            store.choose(store.next("ann"), "b")
            assert store.progress("ann").left > 0 and store.undo("ann", store.last_answer("ann")) is not None
            connection.set_progress_handler(None, 1)
            steps[n] = count
    assert 100 < steps[800] < 1.5 * steps[40]
