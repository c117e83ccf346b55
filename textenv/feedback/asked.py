"""The questions that a feedback store already holds, and the answers that count, so that nothing is asked twice."""

from __future__ import annotations

import os
from typing import NamedTuple

from textenv.feedback.database import Database
from textenv.feedback.records import Answer
from textenv.feedback.store import FeedbackStore

TIMEOUT = 30.0  # seconds to wait for a locked file, as long as `FeedbackStore` does by default
_QUESTIONS_OF_RUN = """
SELECT items.id, kind, prompt, text, low, high FROM items JOIN completions ON item = items.id
WHERE run = ? ORDER BY items.id, place
"""


class Question(NamedTuple):
    """A question in a store, with its completions in the order in which they were added; see `Item` for the fields."""

    id: int
    kind: str
    prompt: str
    completions: tuple[str, ...]
    scale: tuple[float, float]


def questions_of(path: str | os.PathLike[str], run: str) -> list[Question]:
    """Return the questions that were added for a run, in the order in which they were added.

    Args:
        path: The store's file.
        run: The value of `run` in the calls of `FeedbackStore.add`.

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
            rows = database.execute(_QUESTIONS_OF_RUN, (run,)).fetchall()
    finally:
        database.close()
    questions: dict[int, Question] = {}
    for row in rows:  # one row for each completion
        earlier = questions[row["id"]].completions if row["id"] in questions else ()
        scale = (row["low"], row["high"])
        questions[row["id"]] = Question(row["id"], row["kind"], row["prompt"], (*earlier, row["text"]), scale)
    return list(questions.values())


class StandingAnswers:
    """The answers of a store that count at present, skips included, second answers to gold items excluded.

    Args:
        store: The store; each `update` reads the answers that were written since the last `update`.

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
        self._last_read = 0  # the number of the last answer that was read

    def update(self) -> list[Answer]:
        """Read the new answers, and return all that count now, in the order of writing."""
        for answer in self.store.answers(since=self._last_read):
            self._last_read = answer.id
            if answer.undoes is not None:
                self._answers.pop(answer.undoes, None)
            elif not answer.repeat:
                self._answers[answer.id] = answer
        return list(self._answers.values())
