"""The store of questions for people and of their answers: one SQLite file."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable, Sequence

from textenv.feedback.database import Database
from textenv.feedback.queues import Queues
from textenv.feedback.records import (
    Answer,
    Choice,
    Item,
    Kind,
    Progress,
    Record,
    Value,
    check_messages,
    check_names,
    check_question,
    check_rater,
    check_scale,
    check_seconds,
    check_value,
)
from textenv.feedback.rows import ANSWERS, ITEM, read_answer, read_item
from textenv.prompts.chat import Message

LEASE = 600.0  # seconds for which a shown item counts as being in that rater's hands: longer than an answer takes


class FeedbackStore:
    """Questions for people and their answers, in one SQLite file that processes and threads may share.

    An answer is on the disk when its method returns (a write-ahead log, synchronous=FULL), so that a crash of the
    process or the machine loses no acknowledged answer. A writer waits up to `timeout` seconds for another one. Nothing
    is deleted: an undo is a further row, which a reader of the new answers (`since`) sees, too.

    `next` returns the items for a rater, one after the other. The order of an item's completions is drawn once for each
    showing and stored; a showing that was not answered comes again in the same order. Each rater sees a gold item
    twice, the second time in another order, ten answers later or at the end. `textenv.feedback.exchange` exports pairs,
    rankings and scores; `textenv.feedback.agreement` measures how far raters agree.

    Args:
        path: The file, in a folder that exists; it is created if it does not exist.
        timeout: The longest wait for a locked file, in seconds.
        seed: The seed of the orders of completions; None draws one.

    Raises:
        ValueError: If the file is not a feedback store, or one of another version.
        sqlite3.OperationalError: If the file cannot be opened, or stays locked.

    Example:
        >>> import os, tempfile
        >>> store = FeedbackStore(os.path.join(tempfile.mkdtemp(), "answers.db"))
        >>> item = store.add("It was", [" good.", " bad."], kind="compare", models=["new", "old"])
        >>> shown = store.next("ann")
        >>> store.choose(shown, "ab"[shown.completions.index(" good.")], seconds=2.5)
        1
        >>> [(answer.completions[better], answer.rater) for answer in store.answers() for better, _ in answer.pairs()]
        [(' good.', 'ann')]
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = 30.0, seed: int | None = None) -> None:
        self.path = os.fspath(path)
        self._db = Database(self.path, timeout)
        self._queues = Queues(self._db)
        self._random = random.Random(seed)

    def close(self) -> None:
        """Close the file; the last process to do so removes the write-ahead log."""
        self._db.close()

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(
        self,
        prompt: str,
        completions: Sequence[str],
        kind: Kind = "score",
        *,
        models: str | Sequence[str | None] | None = None,
        run: str | None = None,
        raters: int = 1,
        gold: bool = False,
        scale: tuple[float, float] = (1, 5),
        messages: Sequence[Message] | None = None,
    ) -> int:
        """Add a question.

        Args:
            prompt: The prompt of the completions.
            completions: One to eight texts to score, two to compare, two to eight to rank.
            kind: "score", "compare" or "rank".
            models: The models that wrote the completions: one name for all, or one each. Raters do not see them.
            run: The run that the completions come from. Raters do not see it.
            raters: The number of raters who are to answer.
            gold: Whether each rater sees the item a second time, to check that the answer is the same.
            scale: The lowest and the highest score.
            messages: The messages of a prompt that is a chat, each with "role" and "content". Raters read them, but
                reward models are trained on `prompt`, the text that the chat template makes of them.

        Returns:
            The item's number.

        Raises:
            ValueError: If a text is not a str, there are too many or too few completions, or a message has no role or
                content.
        """
        with self._db.writing():
            return self._add(prompt, completions, kind, models, run, raters, gold, scale, messages)

    def _add(
        self,
        prompt: str,
        completions: Sequence[str],
        kind: str,
        models: str | Sequence[str | None] | None,
        run: str | None,
        raters: int = 1,
        gold: bool = False,
        scale: tuple[float, float] = (1, 5),
        messages: Sequence[Message] | None = None,
    ) -> int:
        check_question(kind, prompt, completions)
        chat = check_messages(messages)
        low, high = check_scale(scale)
        check_names([run, *([models] if isinstance(models, str) else models or [])])
        if raters < 1:
            raise ValueError(f"Expected `raters` to be 1 or more, got {raters}.")
        if models is None or isinstance(models, str):
            models = [models] * len(completions)
        if len(models) != len(completions):
            raise ValueError(f"Expected one of `models` for each completion, got {len(models)} of {len(completions)}.")
        item = self._db.insert(
            "items",
            **dict(kind=kind, prompt=str(prompt), run=run, low=low, high=high),
            **dict(raters=raters, gold=gold, time=time.time(), messages=chat and json.dumps(chat)),
        )
        for index, (text, model) in enumerate(zip(completions, models, strict=True)):
            self._db.insert("completions", item=item, place=index, text=str(text), model=model)
        self._queues.add(item, kind, gold)
        return item

    def next(self, rater: str, kind: Kind | None = None) -> Item | None:
        """Return the rater's next item, or None if there is none.

        An item that was shown and not answered comes first; then gold items that are due; then new items in the order
        in which they were added, those in other raters' hands last; then the remaining gold items.

        Args:
            rater: The rater's name.
            kind: The kind of question; None for any.
        """
        rater = check_rater(rater)
        with self._db.writing():
            following = self._queues.next(rater, kind, time.time() - LEASE)
            if following is None:
                return None
            if following.showing is not None:
                self._db.execute("UPDATE showings SET handed = ? WHERE id = ?", (time.time(), following.showing))
                return self._item(following.showing)
            assert following.item is not None, "a showing or an item"
            if not following.repeat:
                self._queues.move_on(rater, following.item)
            return self._show(following.item, rater, following.repeat)

    def _show(self, item: int, rater: str, repeat: int) -> Item:
        n = self._db.execute("SELECT count(*) FROM completions WHERE item = ?", (item,)).fetchone()[0]
        order = self._random.sample(range(n), n)
        first = self._db.execute("SELECT places FROM showings WHERE item = ? AND rater = ?", (item, rater)).fetchone()
        # The second showing of a gold item has another order than the first.
        while n > 1 and first is not None and order == json.loads(first["places"]):
            order = self._random.sample(range(n), n)
        return self._item(self._insert_showing(item, rater, repeat, order))

    def _insert_showing(self, item: int, rater: str, repeat: int, order: Sequence[int]) -> int:
        kind = self._db.execute("SELECT kind FROM items WHERE id = ?", (item,)).fetchone()["kind"]
        row = dict(item=item, rater=rater, kind=kind, repeat=repeat, places=json.dumps(list(order)))
        showing = self._db.insert("showings", **row, handed=time.time())
        self._queues.show(showing, item, rater, repeat)
        return showing

    def _item(self, showing: int) -> Item:
        row = self._db.execute(ITEM, (showing,)).fetchone()
        return read_item(row, [text for text, _ in self._completions(row["item"])])

    def _completions(self, item: int) -> list[tuple[str, str | None]]:
        rows = self._db.execute("SELECT text, model FROM completions WHERE item = ? ORDER BY place", (item,))
        return [(row["text"], row["model"]) for row in rows]

    def showing(self, number: int, rater: str) -> Item:
        """Return an item as it was shown to a rater, for a page that knows only the showing's number.

        Raises:
            ValueError: If there was no such showing to this rater.
        """
        with self._db.reading():
            row = self._db.execute("SELECT rater FROM showings WHERE id = ?", (number,)).fetchone()
            if row is None or row["rater"] != rater:
                raise ValueError(f"Expected the number of something that {rater} was shown, got {number}.")
            return self._item(number)

    def score(self, item: Item, scores: Sequence[float], seconds: float | None = None) -> int:
        """Write a score for each completion, in the order shown, and return the answer's number.

        Args:
            item: The item, as `next` returned it.
            scores: A number within the scale for each completion.
            seconds: The time that the rater took.

        Raises:
            ValueError: If the item is of another kind or has another answer already, or the scores are not one number
                within the scale for each completion.
        """
        _check_kind(item, "score")
        value = check_value("score", scores, len(item.order), item.scale)
        assert isinstance(value, tuple)
        added = tuple(score for _, score in sorted(zip(item.order, value, strict=True)))  # in the order of adding
        return self._answer(item, "score", added, seconds)

    def choose(self, item: Item, choice: Choice, seconds: float | None = None) -> int:
        """Write which of two completions is better: "a", the first shown, "b", the second, "tie" or "both_bad".

        Returns:
            The answer's number.

        Raises:
            ValueError: If the item is of another kind or has another answer already, or the choice is unknown.
        """
        _check_kind(item, "compare")
        values = {"a": item.order[0], "b": item.order[1], "tie": "tie", "both_bad": "both_bad"}
        if not isinstance(choice, str) or choice not in values:
            raise ValueError(f"Expected one of {', '.join(values)}, got {choice!r:.80}.")
        return self._answer(item, "compare", check_value("compare", values[choice], 2, item.scale), seconds)

    def rank(self, item: Item, ranking: Sequence[int], seconds: float | None = None) -> int:
        """Write the order of the completions, best first, each by its index in the order shown.

        Returns:
            The answer's number.

        Raises:
            ValueError: If the item is of another kind or has another answer already, or an index is missing or doubled.
        """
        _check_kind(item, "rank")
        value = check_value("rank", ranking, len(item.order), item.scale)
        assert isinstance(value, tuple)
        return self._answer(item, "rank", tuple(item.order[int(index)] for index in value), seconds)

    def skip(self, item: Item, seconds: float | None = None) -> int:
        """Record that the rater skips the item, and return the record's number; the item is not shown to them again."""
        return self._answer(item, "skip", None, seconds)

    def _answer(self, item: Item, kind: str, value: Value, seconds: float | None) -> int:
        check_seconds("seconds", seconds)
        with self._db.writing():  # the check and the insertion are one transaction, so two pages cannot both answer
            row = self._db.execute("SELECT * FROM answers WHERE showing = ? AND stands", (item.showing,)).fetchone()
            if row is None:
                return self._insert_answer(item.showing, item.rater, kind, value, seconds, time.time())
            if (row["kind"], row["value"]) == (kind, json.dumps(value)):
                return int(row["id"])  # sent again by a page that did not receive the acknowledgement
            raise ValueError(
                f"Expected an unanswered item, got item {item.id}, answered by {item.rater}. Undo it first."
            )

    def _insert_answer(
        self, showing: int, rater: str, kind: str, value: Value, seconds: float | None, when: float
    ) -> int:
        row = dict(showing=showing, rater=rater, kind=kind, value=json.dumps(value), seconds=seconds, time=when)
        answer = self._db.insert("answers", **row, stands=True)
        self._queues.answer(showing, kind)
        return answer

    def last_answer(self, rater: str) -> int | None:
        """Return the number of the rater's last answer or skip that counts, which `undo` would take back, or None."""
        with self._db.reading():
            return self._last_answer(check_rater(rater))

    def _last_answer(self, rater: str) -> int | None:
        statement = "SELECT id FROM answers WHERE rater = ? AND stands ORDER BY id DESC LIMIT 1"
        row = self._db.execute(statement, (rater,)).fetchone()
        return None if row is None else int(row["id"])

    def undo(self, rater: str, answer: int | None = None) -> Item | None:
        """Take back one of the rater's answers or skips, and return its item, which comes next; None if there is none.

        Args:
            rater: The rater's name.
            answer: The answer's number; by default, the last one that counts. A second call with the same number
                changes nothing, so that a page may send it again; a second call without a number takes back another
                answer.

        Raises:
            ValueError: If the rater gave no such answer.
        """
        rater = check_rater(rater)
        with self._db.writing():
            number = self._last_answer(rater) if answer is None else answer
            if number is None:
                return None
            row = self._db.execute("SELECT * FROM answers WHERE id = ?", (number,)).fetchone()
            if row is None or row["rater"] != rater or row["kind"] == "undo":
                raise ValueError(f"Expected the number of an answer that {rater} gave, got {number}.")
            if row["stands"]:
                self._db.execute("UPDATE answers SET stands = 0 WHERE id = ?", (number,))
                undo = dict(showing=row["showing"], rater=rater, kind="undo", value="null", time=time.time())
                self._db.insert("answers", **undo, stands=False, undoes=number)
                self._queues.answer(row["showing"], row["kind"], by=-1)
                # The open showing that was handed out last comes first in `next`, so this item follows.
                self._db.execute("UPDATE showings SET handed = ? WHERE id = ?", (time.time(), row["showing"]))
            return self._item(row["showing"])

    def answers(self, since: int = 0) -> list[Answer]:
        """Return the answers that count and were written after answer `since`, in the order of writing.

        An answer that has been undone is left out. If its number is `since` or lower, so that the reader has seen it,
        the result has the undo instead: an answer of kind "undo" whose `undoes` is that number.
        """
        with self._db.reading():
            rows = self._db.execute(ANSWERS, {"since": since}).fetchall()
            texts = {item: self._completions(item) for item in {row["item"] for row in rows}}
        return [read_answer(row, texts[row["item"]]) for row in rows]

    def record(self, records: Iterable[Record]) -> list[int]:
        """Write answers from elsewhere, all or none, together with their questions, which are not asked again.

        Returns:
            The answers' numbers.

        Raises:
            ValueError: If a record is not a valid answer; the message has its number, from 1.

        Example:
            >>> import os, tempfile
            >>> store = FeedbackStore(os.path.join(tempfile.mkdtemp(), "answers.db"))
            >>> store.record([Record("compare", "It was", [" good.", " bad."], 0, "ann")])
            [1]
        """
        numbers = []
        with self._db.writing():
            for number, record in enumerate(records, start=1):
                try:
                    numbers.append(self._record(record))
                except ValueError as error:
                    raise ValueError(f"Record {number}: {error}") from error
        return numbers

    def _record(self, record: Record) -> int:
        question = record.prompt, record.completions, record.kind
        # With the default of one rater, this answer closes the item, so that nobody is asked.
        item = self._add(*question, record.models, record.run, scale=record.scale, messages=record.messages)
        n = len(record.completions)
        value = check_value(record.kind, record.value, n, record.scale)
        rater, when = check_rater(record.rater), check_seconds("time", record.time) or time.time()
        showing = self._insert_showing(item, rater, repeat=0, order=range(n))
        return self._insert_answer(showing, rater, record.kind, value, check_seconds("seconds", record.seconds), when)

    def progress(self, rater: str, kind: Kind | None = None) -> Progress:
        """Return a rater's progress with a kind of question, or with all kinds for None."""
        with self._db.reading():
            return self._queues.progress(check_rater(rater), kind)


def _check_kind(item: Item, kind: str) -> None:
    if item.kind != kind:
        raise ValueError(f"Expected an answer to {item.kind} item {item.id}, got one to {kind}.")
