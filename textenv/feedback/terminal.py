"""The dialogue in which a person rates model output in a terminal."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from textenv.feedback.asked import StandingAnswers
from textenv.feedback.records import Choice, Item, Kind
from textenv.feedback.store import FeedbackStore
from textenv.prompts.chat import Message
from textenv.text.printable import printable

CHOICES: dict[str, Choice] = {"a": "a", "b": "b", "t": "tie", "n": "both_bad"}
COMMANDS = {"u": "undo", "s": "skip", "q": "quit"}
COMMANDS_HELP = "u undoes the answer before, s skips, q quits (all answers are kept), ? helps"
PAUSE = 0.5  # seconds between two looks for a new question: short enough to seem immediate


class RatingTerminal:
    """A dialogue with one rater, who scores completions, chooses one of two, or ranks them.

    An answer is in the store before the next question is shown, and a rater who comes back is asked only the remaining
    questions. A prompt that is a chat is shown as its messages. Control characters in all texts are escaped. After an
    invalid line the expected one is explained, and the question asked again. The end of the input quits.

    Args:
        store: The store with the questions, to which the answers are written.
        rater: The rater's name.
        kind: The kind of question, "score", "compare" or "rank"; None for any.
        console: The console to print to; rich's default console if None.
        read: A function from a prompt to the line that the rater types after it; by default, the console's `input`.

    Example:
        >>> import io, os, tempfile
        >>> store = FeedbackStore(os.path.join(tempfile.mkdtemp(), "answers.db"))
        >>> number = store.add("The film was", [" good."])
        >>> terminal = RatingTerminal(store, "ann", console=Console(file=io.StringIO()), read=lambda prompt: "4")
        >>> terminal.run(), store.answers()[0].value
        (True, (4.0,))
    """

    def __init__(
        self,
        store: FeedbackStore,
        rater: str,
        kind: Kind | None = None,
        console: Console | None = None,
        read: Callable[[str], str] | None = None,
    ) -> None:
        self.store, self.rater, self.kind = store, rater, kind
        self.console = console or Console(highlight=False)
        self.read = read or (lambda prompt: self.console.input(Text(prompt)))
        self._standing = StandingAnswers(store)

    def run(self, items: Collection[int] | None = None, wait: bool = False) -> bool:
        """Ask until no question is left, and return True, or False if the rater quits.

        Args:
            items: The items to wait for: `run` stops when all of them are answered, and only answers of this call can
                be undone. None for no such limit.
            wait: Whether to wait for new questions when none is left, until Ctrl-C.
        """
        left = None if items is None else set(items)
        answered: list[int] = []
        while left is None or left:
            item = self.store.next(self.rater, self.kind)
            if item is None:
                if not wait:
                    break
                time.sleep(PAUSE)
                continue
            action = self._ask(item)
            if action == "quit":
                return False
            if action != "undo":
                answered.append(item.id)
            elif left is not None and not answered:
                self.console.print("Nothing to undo: the answer before is acted upon.")
            elif (undone := self.store.undo(self.rater)) is None:
                self.console.print("Nothing to undo.")
            else:
                self.console.print(f"Undone: the answer to {undone.kind} {undone.id}.")
                if answered:  # empty if the undone answer is older than this call
                    answered.pop()
            if left is not None:
                left = set(items or ()) - set(answered)
        return True

    def _ask(self, item: Item) -> str:
        """Show an item and read lines until one is a command or a valid answer, which is stored.

        Returns:
            "answer" (a skip included), "undo" or "quit".
        """
        self._show(item)
        start = time.monotonic()
        while True:
            try:
                line = self.read(f"{self.status()} | {_wanted(item)} (u, s, q, ?): ").strip().lower()
            except EOFError:
                return "quit"
            except UnicodeDecodeError:
                line = "\ufffd"  # a stand-in for bytes that are no text: it is no valid answer, and is explained below
            if line == "?":
                self.console.print(f"Expected {_wanted(item)}. {COMMANDS_HELP}.")
                continue
            seconds = time.monotonic() - start
            if line in ("u", "q"):
                return COMMANDS[line]
            try:
                self._write(item, line, seconds)
            except ValueError as error:
                self.console.print(Text(printable(f"{error} {COMMANDS_HELP}.")))
            else:
                return "answer"

    def _show(self, item: Item) -> None:
        completions = item.completions
        prompt = Text(printable(item.prompt), "dim")
        if item.messages is None and len(completions) == 1:  # in the panel of the text that it continues
            prompt, completions = Text.assemble(prompt, printable(completions[0])), ()
        shown = prompt if item.messages is None else _chat(item.messages)
        self.console.print(Panel(shown, title=f"{item.kind} {item.id}", title_align="left"))
        for name, text in zip(_names(item), completions, strict=False):
            self.console.print(Panel(Text(printable(text)), title=name, title_align="left"))

    def _write(self, item: Item, line: str, seconds: float) -> None:
        """Store the answer of a line.

        Raises:
            ValueError: If the line is not a valid answer.
        """
        invalid = ValueError(f"Expected {_wanted(item)}, got {line!r:.60}.")
        if line == "s":
            self.store.skip(item, seconds)
        elif item.kind == "compare":
            if line not in CHOICES:
                raise invalid
            self.store.choose(item, CHOICES[line], seconds)
        elif item.kind == "rank":
            if sorted(line.split()) != sorted(_names(item)):
                raise invalid
            self.store.rank(item, [int(word) - 1 for word in line.split()], seconds)
        else:
            low, high = item.scale
            scores = [number for number in map(_number, line.split()) if low <= number <= high]
            if not len(scores) == len(line.split()) == len(item.completions):
                raise invalid
            self.store.score(item, scores, seconds)

    def status(self) -> str:
        """Return the number of the rater's answers that count, and the mean of their scores."""
        answers = self._standing.update()
        own = [answer for answer in answers if answer.rater == self.rater and self.kind in (None, answer.kind)]
        values = [answer.value for answer in own if answer.kind != "skip"]
        # Scores are floats; the value of a ranking is a tuple of indices, which are ints.
        scores = [score for value in values if isinstance(value, tuple) for score in value if isinstance(score, float)]
        n = f"{len(values)} answer{'' if len(values) == 1 else 's'}"
        return f"{n}, mean {statistics.fmean(scores):.2f}" if scores else n


def _chat(messages: Sequence[Message]) -> Group:
    """Return messages, each below its role; the texts are indented, so that no line of a text can pass for a role."""
    lines: list[RenderableType] = []
    for message in messages:
        text = Text(printable(message["content"]), "dim")
        lines += [Text(printable(message["role"]), "bold"), Padding(text, (0, 0, 0, 2))]
    return Group(*lines)


def _names(item: Item) -> list[str]:
    return ["a", "b"] if item.kind == "compare" else [str(i + 1) for i in range(len(item.completions))]


def _wanted(item: Item) -> str:
    """Return a description of a valid answer to an item."""
    n = len(item.completions)
    if item.kind == "compare":
        return "a or b for the better one, t for a tie, n for neither"
    if item.kind == "rank":
        return f"the numbers 1 to {n}, the best first, as {' '.join(reversed(_names(item)))}"
    low, high = item.scale
    return f"{'a score' if n == 1 else f'{n} scores'} from {low:g} to {high:g}"


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan  # compares false with any range
