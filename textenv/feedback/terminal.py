"""People's answers in the terminal: what a model wrote, a line to answer in, and how the answers stand so far."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from textenv.feedback.asked import StandingAnswers
from textenv.feedback.records import Choice, Item, Kind
from textenv.feedback.store import FeedbackStore
from textenv.printable import printable

CHOICES: dict[str, Choice] = {"a": "a", "b": "b", "t": "tie", "n": "both_bad"}
COMMANDS = {"u": "undo", "s": "skip", "q": "quit"}
COMMANDS_HELP = "u undoes the answer before, s skips, q quits (all answers are kept), ? helps"
PAUSE = 0.5  # seconds between two looks for a new question


class RatingTerminal:
    """Asks a rater one question after the other: to score completions, to choose one of two, or to rank them.

    An answer is in the store before the next question is shown; a rater who comes back is asked only what is left.
    What the model wrote is shown, not obeyed. A line that is no answer is explained, and asked again. The end of the
    input quits.

    Args:
        store: Where the questions are, and the answers go.
        rater: Who answers.
        kind: Ask only for scores, choices or rankings.
        console: Where to; rich's own by default.
        read: Returns a line for a prompt; the console's by default.

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
        """Ask until nothing is left, and return True; False where the rater quits.

        Args:
            items: Stop when these are answered or skipped; undoing reaches back to the answers of this call alone.
            wait: Look for new questions where none is left, until Ctrl-C.
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
            done = self._ask(item)
            if done == "quit":
                return False
            if done != "undo":
                answered.append(item.id)
            elif left is not None and not answered:
                self.console.print("Nothing to undo: the answer before is acted upon.")
            elif (undone := self.store.undo(self.rater)) is None:
                self.console.print("Nothing to undo.")
            else:
                self.console.print(f"Undone: the answer to {undone.kind} {undone.id}.")
                if answered:
                    answered.pop()
            if left is not None:
                left = set(items or ()) - set(answered)
        return True

    def _ask(self, item: Item) -> str:
        """Show an item and take lines until one is an answer, which is written, or a command; return which."""
        self._show(item)
        start = time.monotonic()
        while True:
            try:
                line = self.read(f"{self.status()} | {_wanted(item)} (u, s, q, ?): ").strip().lower()
            except EOFError:
                return "quit"
            except UnicodeDecodeError:
                line = "\ufffd"  # bytes that are no text are no answer either
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
        parts: list[str | tuple[str, str]] = [(printable(item.prompt), "dim")]
        single = len(item.completions) == 1
        if single:
            parts.append(printable(item.completions[0]))
        self.console.print(Panel(Text.assemble(*parts), title=f"{item.kind} {item.id}", title_align="left"))
        for name, text in zip(_names(item), () if single else item.completions, strict=False):
            self.console.print(Panel(Text(printable(text)), title=name, title_align="left"))

    def _write(self, item: Item, line: str, seconds: float) -> None:
        """Write the answer that a line is.

        Raises:
            ValueError: If it is none.
        """
        wrong = ValueError(f"Expected {_wanted(item)}, got {line!r:.60}.")
        if line == "s":
            self.store.skip(item, seconds)
        elif item.kind == "compare":
            if line not in CHOICES:
                raise wrong
            self.store.choose(item, CHOICES[line], seconds)
        elif item.kind == "rank":
            if sorted(line.split()) != sorted(_names(item)):
                raise wrong
            self.store.rank(item, [int(word) - 1 for word in line.split()], seconds)
        else:
            low, high = item.scale
            scores = [number for number in map(_number, line.split()) if low <= number <= high]
            if not len(scores) == len(line.split()) == len(item.completions):
                raise wrong
            self.store.score(item, scores, seconds)

    def status(self) -> str:
        """Return how many answers of the rater count, and the mean of the scores."""
        own = [a for a in self._standing.update() if a.rater == self.rater and self.kind in (None, a.kind)]
        values = [answer.value for answer in own if answer.kind != "skip"]
        scores = [score for value in values if isinstance(value, tuple) for score in value if isinstance(score, float)]
        n = f"{len(values)} answer{'' if len(values) == 1 else 's'}"
        return f"{n}, mean {statistics.fmean(scores):.2f}" if scores else n


def _names(item: Item) -> list[str]:
    return ["a", "b"] if item.kind == "compare" else [str(place + 1) for place in range(len(item.completions))]


def _wanted(item: Item) -> str:
    """Say what an answer to an item is."""
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
        return math.nan  # which is in no range
