"""What a store of feedback was asked already, and which answers count by now: so that nothing is asked twice."""

from __future__ import annotations

import os
from typing import NamedTuple

from textenv.feedback.database import Database
from textenv.feedback.records import Answer
from textenv.feedback.store import FeedbackStore

TIMEOUT = 30.0  # seconds for which a locked file is waited for
_ASKED = """
SELECT items.id, kind, prompt, text, low, high FROM items JOIN completions ON item = items.id
WHERE run = ? ORDER BY items.id, place
"""


class Question(NamedTuple):
    """A question that was added, with its completions in the order of adding; what each field is, `Item` says."""

    id: int
    kind: str
    prompt: str
    completions: tuple[str, ...]
    scale: tuple[float, float]


def questions_of(path: str | os.PathLike[str], run: str) -> list[Question]:
    """Return the questions that were added under the name of a run, in the order of adding.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "answers.db")
        >>> with FeedbackStore(path) as store:
        ...     number = store.add("It was", [" good.", " bad."], kind="compare", run="mine")
        >>> questions_of(path, "mine")
        [Question(id=1, kind='compare', prompt='It was', completions=(' good.', ' bad.'), scale=(1.0, 5.0))]
    """
    database = Database(os.fspath(path), TIMEOUT)
    try:
        with database.reading():
            rows = database.execute(_ASKED, (run,)).fetchall()
    finally:
        database.close()
    found: dict[int, Question] = {}
    for row in rows:
        before = found[row["id"]].completions if row["id"] in found else ()
        scale = (row["low"], row["high"])
        found[row["id"]] = Question(row["id"], row["kind"], row["prompt"], (*before, row["text"]), scale)
    return list(found.values())


class StandingAnswers:
    """The answers of a store that count, skips among them, kept up to date; those to gold items shown again left out.

    Args:
        store: The store.

    Example:
        >>> import tempfile
        >>> store = FeedbackStore(os.path.join(tempfile.mkdtemp(), "answers.db"))
        >>> number, standing = store.add("It was", [" good."]), StandingAnswers(store)
        >>> score = store.score(store.next("ann"), [4])
        >>> [answer.value for answer in standing.update()]
        [(4.0,)]
        >>> undone = store.undo("ann")
        >>> standing.update()
        []
    """

    def __init__(self, store: FeedbackStore) -> None:
        self.store = store
        self._answers: dict[int, Answer] = {}
        self._seen = 0  # the number of the last row that was read

    def update(self) -> list[Answer]:
        """Read what was written since, and return the answers that count now, in the order of writing."""
        for answer in self.store.answers(since=self._seen):
            self._seen = answer.id
            if answer.undoes is not None:
                self._answers.pop(answer.undoes, None)
            elif not answer.repeat:
                self._answers[answer.id] = answer
        return list(self._answers.values())
