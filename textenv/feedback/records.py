"""The records of a feedback store: items as raters see them, their answers, and the checks of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from textenv.prompts.chat import Message, is_chat

Kind = Literal["score", "compare", "rank"]
Choice = Literal["a", "b", "tie", "both_bad"]

KINDS: tuple[str, ...] = get_args(Kind)
CHOICES: tuple[str, ...] = get_args(Choice)
UNDECIDED = ("tie", "both_bad")
MAX_COMPLETIONS = 8  # few enough that number keys can rank them, and that a reader can keep them in mind
SIZES = {"score": (1, MAX_COMPLETIONS), "compare": (2, 2), "rank": (2, MAX_COMPLETIONS)}  # fewest and most completions

# By kind: a score for each completion; the index of the better one, "tie" or "both_bad"; the indices, best first; None
# for a skip
Value = tuple[float, ...] | int | str | tuple[int, ...] | None


class Item(NamedTuple):
    """A question as one rater sees it.

    Attributes:
        id: The item's number, as `FeedbackStore.add` returned it.
        showing: The number of this showing; an item has one for each rater, and a gold item has two.
        rater: The rater's name.
        kind: The kind of question: "score" each completion, "compare" two, or "rank" all.
        prompt: The prompt of the completions.
        completions: The completions in the order in which this rater sees them, drawn at random and stored.
        order: The index of each of these completions in the list that was added.
        scale: The lowest and the highest score.
        messages: The prompt's messages if it is a chat, each with "role" and "content", which people read in the place
            of the prompt; None for any other prompt.
    """

    id: int
    showing: int
    rater: str
    kind: str
    prompt: str
    completions: tuple[str, ...]
    order: tuple[int, ...]
    scale: tuple[float, float]
    messages: tuple[Message, ...] | None = None


class Answer(NamedTuple):
    """A rater's answer to an item, with the completions in the order in which they were added.

    Attributes:
        id: The answer's number; numbers rise in the order of writing and are never reused.
        item: The item's number.
        kind: "score", "compare", "rank", "skip" or "undo".
        rater: The rater's name.
        prompt: The item's prompt.
        completions: The item's completions.
        value: For "score", a number for each completion; for "compare", the index of the better one, "tie" or
            "both_bad"; for "rank", the indices from the best to the worst; None otherwise.
        models: The model that wrote each completion, or None.
        run: The run that the completions come from, or None.
        scale: The lowest and the highest score.
        order: The indices of the completions in the order in which the rater saw them.
        repeat: 1 if the rater saw a gold item for the second time, else 0.
        seconds: The time that the rater took, or None where it is unknown.
        time: The time of writing, in seconds since 1970.
        undoes: For "undo", the number of the answer that no longer counts.
        messages: The item's messages, or None.

    Example:
        >>> answer = Answer(1, 1, "rank", "ann", "It was ", ("bad", "good", "fair"), (1, 2, 0))
        >>> [(answer.completions[better], answer.completions[worse]) for better, worse in answer.pairs()]
        [('good', 'fair'), ('good', 'bad'), ('fair', 'bad')]
    """

    id: int
    item: int
    kind: str
    rater: str
    prompt: str
    completions: tuple[str, ...]
    value: Value = None
    models: tuple[str | None, ...] = ()
    run: str | None = None
    scale: tuple[float, float] = (1, 5)
    order: tuple[int, ...] = ()
    repeat: int = 0
    seconds: float | None = None
    time: float = 0.0
    undoes: int | None = None
    messages: tuple[Message, ...] | None = None

    def pairs(self) -> list[tuple[int, int]]:
        """Return the indices (better, worse) of each pair of completions that the answer decides: none for a tie."""
        if self.kind == "compare" and isinstance(self.value, int):
            return [(self.value, 1 - self.value)]
        if self.kind == "rank" and isinstance(self.value, tuple):
            return list(itertools.combinations([int(index) for index in self.value], 2))
        if self.kind == "score" and isinstance(self.value, tuple):
            scores = self.value
            return [
                (better, worse)
                for better, worse in itertools.permutations(range(len(scores)), 2)
                if scores[better] > scores[worse]
            ]
        return []


class Progress(NamedTuple):
    """A rater's progress: answers that count, items skipped, and items left, in which gold items count twice."""

    done: int
    skipped: int
    left: int


class Record(NamedTuple):
    """An answer from elsewhere, for `FeedbackStore.record`; see `Answer` for the fields."""

    kind: Kind
    prompt: str
    completions: Sequence[str]
    value: Any
    rater: str
    models: Sequence[str | None] | None = None
    run: str | None = None
    scale: tuple[float, float] = (1, 5)
    seconds: float | None = None
    time: float | None = None
    messages: Sequence[Message] | None = None


def check_rater(rater: str) -> str:
    """Return a rater's name without the spaces around it.

    Raises:
        ValueError: If the name is empty, longer than 64 characters, or has a character that cannot be printed.
    """
    name = rater.strip() if isinstance(rater, str) else ""
    if not 0 < len(name) <= 64 or not name.isprintable():
        raise ValueError(f"Expected a rater's name of 1 to 64 printable characters, got {rater!r:.80}.")
    return name


def check_question(kind: str, prompt: str, completions: Sequence[str]) -> None:
    """Refuse a question that cannot be asked.

    Raises:
        ValueError: If the kind is unknown, a text is not a str or cannot be encoded as UTF-8, or there are too many or
            too few completions for the kind.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected `kind` to be one of {', '.join(KINDS)}, got {kind!r}.")
    texts = [prompt, *completions] if isinstance(completions, Sequence) else [None]
    if isinstance(completions, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"Expected a text as prompt and a list of texts as completions, got {completions!r:.80}.")
    low, high = SIZES[kind]
    if not low <= len(completions) <= high:
        amount = str(low) if low == high else f"{low} to {high}"
        raise ValueError(f"Expected {amount} completions to {kind}, got {len(completions)}.")
    _check_encodable([prompt, *completions])


def check_messages(messages: Sequence[Message] | None) -> tuple[Message, ...] | None:
    """Return the role and the content of each message of a chat, which is all that people read; None for None.

    Raises:
        ValueError: If it is no list of messages, or a role or content is not a str or cannot be encoded as UTF-8.

    Example:
        >>> check_messages([{"role": "user", "content": "Hi", "name": "ann"}])
        ({'role': 'user', 'content': 'Hi'},)
    """
    if messages is None:
        return None
    read = []
    for message in messages if is_chat(messages) else [None]:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                "Expected `messages` to be a list of messages, each with the texts 'role' and 'content', got "
                f"{messages!r:.80}. Leave them out for a prompt that is no chat."
            )
        _check_encodable(texts)
        read.append({"role": texts[0], "content": texts[1]})
    return tuple(read)


def check_value(kind: str, value: Any, n: int, scale: tuple[float, float]) -> Value:
    """Return an answer's value as it is stored: a tuple of floats for scores, ints for indices.

    Args:
        kind: "score", "compare" or "rank".
        value: Scores; the better one's index, "tie" or "both_bad"; or indices, best first.
        n: The number of completions.
        scale: The lowest and the highest score.

    Raises:
        ValueError: If the scores are not `n` numbers within the scale, the choice is unknown, or an index is missing
            or doubled.
    """
    if kind == "compare":
        # `_is_whole` excludes JSON's true, which equals 1 in Python
        if value in UNDECIDED or (_is_whole(value) and value in (0, 1)):
            return value
        raise ValueError(f"Expected 0 or 1, {' or '.join(UNDECIDED)}, got {value!r:.80}.")
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != n:
        raise ValueError(f"Expected a list of {n} to {kind} {n} completions, got {value!r:.80}.")
    if kind == "rank":
        if not all(_is_whole(index) for index in value) or sorted(value) != list(range(n)):
            raise ValueError(f"Expected each of the places 0 to {n - 1} once, got {value!r:.80}.")
        return tuple(value)
    low, high = scale
    if not all(_is_number(score) and low <= score <= high for score in value):
        raise ValueError(f"Expected scores from {low:g} to {high:g}, got {value!r:.80}.")
    return tuple(float(score) for score in value)


def check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    """Return the lowest and the highest score.

    Raises:
        ValueError: If they are not two finite numbers, the lower one first.
    """
    pair = tuple(scale) if isinstance(scale, Sequence) and len(scale) == 2 else ()
    if not pair or not all(_is_number(end) for end in pair) or not pair[0] < pair[1]:
        raise ValueError(f"Expected `scale` to be the lowest and the highest score, got {scale!r}.")
    return scale[0], scale[1]


def check_seconds(name: str, seconds: float | None) -> float | None:
    """Return a duration, or a time since 1970.

    Raises:
        ValueError: If it is neither None nor a finite number from 0.
    """
    if seconds is not None and not (_is_number(seconds) and seconds >= 0):
        raise ValueError(f"Expected `{name}` to be 0 or more, got {seconds!r:.80}.")
    return seconds


def check_names(names: Sequence[str | None]) -> None:
    """Refuse names of models and runs that are neither str nor None.

    Raises:
        ValueError: If a name is anything else.
    """
    if not all(name is None or isinstance(name, str) for name in names):
        raise ValueError(f"Expected names of models and runs to be texts or None, got {names!r:.80}.")


def _check_encodable(texts: Iterable[Any]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Expected texts that UTF-8 can write, got {text!r:.80}: {error.reason}.") from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_whole(value) and abs(value) <= 2**53  # the whole numbers that a float holds exactly
