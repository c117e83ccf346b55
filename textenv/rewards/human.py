"""People as the reward: finished texts are asked about in a store of feedback, and their answers are waited for."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from textenv.completion import Preds
from textenv.feedback.asked import StandingAnswers, questions_of
from textenv.feedback.records import Answer, Kind, check_scale
from textenv.feedback.store import FeedbackStore
from textenv.prompts import Prompt
from textenv.rewarding import DROPPED, Score
from textenv.rewards.base import BatchReward, RewardLike, check_choice
from textenv.rewards.registry import read_reward
from textenv.trust import check_written

POLL = 0.5  # seconds between two looks for answers
GROUP = {"score": 1, "compare": 2, "rank": 4}  # the most texts of one question


@runtime_checkable
class Learner(Protocol):
    """A reward that learns from people's answers, as `agents.learned_reward.LearnedReward`."""

    def fit(self, answers: Sequence[Answer]) -> None:
        """Learn from all answers that count so far, those of the last time among them."""

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of the rows, as `BatchReward` does."""


@dataclass
class HumanReward(BatchReward):
    """What people say of finished texts, who answer in `textenv rate --db FILE`, on its page or in another terminal.

    Without `learned`, each text is a question, and training waits until all are answered: a text's reward is the mean
    of the scores that it got, as they were given. A text that was only skipped is left out of training. Ctrl-C ends the
    waiting. A text that was asked before under the same `run` is not asked again: a run that was stopped and goes on
    finds its answers.

    With `learned`, a reward model scores at once, and people are asked about some of the texts meanwhile: those that
    stand evenly between the worst and the best score. Whenever there are `every` answers more, the model learns from
    all that the store has (Christiano et al., 2017, section 2.2). So many must be there to begin with: `textenv rate
    MODEL` collects them.

    Evaluations ask as well: with people who are waited for, keep them small.

    Args:
        db: The store's file; a new one of a configuration lies below the current folder, with a name in .db.
        scale: The lowest and the highest score that people may give.
        run: Under which name the store keeps the questions.
        raters: How many people are to answer each question.
        learned: A reward with a method `fit`, or its name or mapping: "agents.learned_reward:LearnedReward".
        kind: With `learned`, what people are asked: to "score" a text, or to "compare" or "rank" texts of one prompt.
        every: With `learned`, how many answers it takes to learn, and to learn again.
        n_asked: With `learned`, how many questions may wait for an answer.

    Attributes:
        attend: A function that is given the numbers of the questions that lack an answer, before they are waited for,
            and may have somebody answer them on the spot; None.

    Raises:
        ValueError: If a number or the kind is out of its range, or the store has too few answers to learn from.
        TypeError: If `learned` has no method `fit`.

    Example:
        >>> import tempfile
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> path = os.path.join(tempfile.mkdtemp(), "answers.db")
        >>> with FeedbackStore(path) as store:  # somebody has answered
        ...     number = store.add("a", ["ab"], run="training", scale=(0, 1))
        ...     answer = store.score(store.next("ann"), [0.75])
        >>> HumanReward(path, scale=(0, 1))(Prompt("a"), Preds(CharTokenizer("ab"), [1, 2]), True)
        0.75
    """

    db: str | os.PathLike[str]
    scale: tuple[float, float] = (1, 5)
    run: str = "training"
    raters: int = 1
    learned: RewardLike | None = None
    kind: Kind = "score"
    every: int = 50
    n_asked: int = 8

    score_at = "rollout_end"
    may_drop = True
    attend: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        low, high = check_scale(self.scale)
        self.scale = (float(low), float(high))
        check_choice("kind", self.kind, tuple(GROUP))
        if not (os.path.isfile(self.db) and os.path.getsize(self.db)):  # else it is a store, or refused as none
            check_written(self.db, ".db")
        if min(self.raters, self.every, self.n_asked) < 1:
            numbers = f"{self.raters}, {self.every} and {self.n_asked}"
            raise ValueError(f"Expected `raters`, `every` and `n_asked` to be at least 1, got {numbers}.")
        if self.learned is None and self.kind != "score":
            raise ValueError(f"Expected kind='score' without `learned`, got {self.kind!r}, which gives no numbers.")
        self._standing: StandingAnswers | None = None
        self._asked: dict[str, dict[tuple[str, tuple[str, ...]], int]] = {}  # the numbers of questions, by run
        self._n_learned = 0  # of how many answers the learner knows
        self._has_warned = False
        self._learner: Learner | None = None
        if self.learned is not None:
            found: Any = read_reward(self.learned)
            if not isinstance(found, Learner):
                raise TypeError(f"Expected `learned` to be a reward with a method `fit`, got {found!r:.80}.")
            self._learner = found
            n = sum(answer.value is not None for answer in self._open().update())
            if n < self.every:
                raise ValueError(
                    f"Expected {self.every} answers in {self.db} to learn from (`every`), got {n}: collect them first, "
                    "with textenv rate MODEL --prompts FILE."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_standing": None, "attend": None}  # a file that is open cannot be pickled

    def _open(self) -> StandingAnswers:
        """Open the store, once."""
        if self._standing is None:
            self._standing = StandingAnswers(FeedbackStore(self.db))
        return self._standing

    def _known(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """Return the run's questions of this kind and scale, by prompt and texts: their numbers."""
        if self.run not in self._asked:
            self._asked[self.run] = {
                (one.prompt, one.completions): one.id
                for one in questions_of(self.db, self.run)
                if (one.kind, one.scale) == (self.kind, self.scale)
            }
        return self._asked[self.run]

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of the rows."""
        standing = self._open()
        texts = [(str(prompt), one.text) for prompt, one in zip(prompts, preds, strict=True)]
        if self._learner is None:
            asked = [self._ask(prompt, [text]) for prompt, text in texts]
            return _means(asked, self._wait(asked))
        answers = standing.update()
        if not self._n_learned or len(answers) - self._n_learned >= self.every:
            self._learner.fit(answers)
            self._n_learned = len(answers)
        scores = self._learner.score(prompts, preds, dones)
        n_open = len(set(self._known().values()) - {answer.item for answer in answers})
        for question in _questions(texts, scores, self.kind, self.n_asked - n_open):
            self._ask(*question)
        return scores

    def _ask(self, prompt: str, texts: Sequence[str]) -> int:
        """Add a question, unless it was asked before, and return its number."""
        known, key = self._known(), (prompt, tuple(texts))
        if key not in known:
            options: dict[str, Any] = {"run": self.run, "raters": self.raters, "scale": self.scale}
            known[key] = self._open().store.add(prompt, texts, self.kind, **options)
        return known[key]

    def _wait(self, items: Collection[int]) -> list[Answer]:
        """Return the answers that count, once so many raters as are wanted have answered or skipped each item."""
        has_attended = self.attend is None
        while True:
            answers = self._open().update()
            raters: dict[int, set[str]] = defaultdict(set)
            for answer in answers:
                raters[answer.item].add(answer.rater)
            missing = [item for item in dict.fromkeys(items) if len(raters[item]) < self.raters]
            if not missing:
                return answers
            if not has_attended:
                has_attended = True
                self.attend(missing)
                continue
            if not self._has_warned:
                self._has_warned = True
                message = f"waiting for {len(missing)} answers: textenv rate --db {self.db}. Not said again."
                warnings.warn(message, stacklevel=4)
            time.sleep(POLL)


def _means(items: Sequence[int], answers: Sequence[Answer]) -> list[Score]:
    """Return the mean of the scores of each item; dropped where all have skipped it."""
    given: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.kind == "score" and isinstance(answer.value, tuple):
            given[answer.item].append(float(answer.value[0]))
    return [statistics.fmean(given[item]) if given[item] else DROPPED for item in items]


def _questions(
    texts: Sequence[tuple[str, str]], scores: Sequence[Score], kind: Kind, n: int
) -> list[tuple[str, list[str]]]:
    """Return at most `n` questions about rows: prompt and texts, from the best to the worst, evenly spread."""
    by_prompt: dict[str, dict[str, float]] = defaultdict(dict)
    for (prompt, text), score in zip(texts, scores, strict=True):
        by_prompt[prompt][text] = score if isinstance(score, float) else 0.0
    size, least = GROUP[kind], min(GROUP[kind], 2)
    questions = []
    for prompt, found in by_prompt.items():
        distinct = list(found)
        parts = [distinct[start : start + size] for start in range(0, len(distinct), size)]
        questions += [(statistics.fmean(found[text] for text in p), prompt, p) for p in parts if len(p) >= least]
    questions.sort(key=lambda question: -question[0])
    if len(questions) > n:
        questions = [questions[i * (len(questions) - 1) // max(n - 1, 1)] for i in range(max(n, 0))]
    return [(prompt, part) for _, prompt, part in questions]
