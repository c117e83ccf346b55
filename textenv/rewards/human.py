"""The reward by people, who answer questions about finished texts in a feedback store."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from textenv.checks.trust import check_written
from textenv.episodes.completion import Preds
from textenv.episodes.scores import DROPPED, Score
from textenv.episodes.waiting import waiting_for_people
from textenv.feedback.asked import StandingAnswers, questions_of
from textenv.feedback.records import Answer, Kind, check_scale
from textenv.feedback.store import FeedbackStore
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, RewardLike, check_choice
from textenv.rewards.registry import read_reward

POLL = 0.5  # seconds between two looks into the store: short for a person, long for a database
GROUP = {"score": 1, "compare": 2, "rank": 4}  # the most texts in one question: more are tiring to rank


@runtime_checkable
class Learner(Protocol):
    """The protocol of rewards that learn from people's answers, such as `agents.LearnedReward`."""

    def fit(self, answers: Sequence[Answer]) -> None:
        """Learn from all answers that count so far, those of earlier calls included."""

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of the rows, as `BatchReward` does."""


@dataclass
class HumanReward(BatchReward):
    """The scores that people give to finished texts in `textenv rate --db FILE`, on its page or in another terminal.

    Without `learned`, each text becomes a question and training waits for the answers. The reward of a text is the mean
    of its scores, as people gave them; a text that every rater skipped is left out of training. Ctrl-C ends the
    waiting. Under the same `run` no text is asked about twice, so a resumed run finds the answers it already has.

    With `learned`, a reward model scores the texts at once. Meanwhile people are asked about some of them, spread
    evenly from the best to the worst score, and whenever `every` more answers have come in, the model learns from all
    answers in the store (Christiano et al., 2017, section 2.2). The store must hold the first `every` answers at the
    start: `textenv rate MODEL` collects them.

    Evaluations ask people as well: keep them small where training waits for the answers.

    Args:
        db: The file of the store. A configuration may name a new one only below the current folder, ending in .db.
        scale: The lowest and the highest score that people may give.
        run: The name under which the store keeps the questions.
        raters: The number of people who answer each question.
        learned: A reward with a method `fit`, or its name or mapping: "agents.supervised.learned_reward:LearnedReward".
        kind: With `learned`, the kind of question: to "score" a text, or to "compare" or "rank" texts of one prompt.
        every: With `learned`, the number of new answers after which it learns again.
        n_asked: With `learned`, the most questions that wait for an answer at a time.

    Attributes:
        attend: A function that is called once before the waiting, with the numbers of the questions that lack an
            answer, or None. It may have somebody answer them on the spot.

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
        # A file with content is opened as a store or refused, but a new or empty file would be written.
        if not (os.path.isfile(self.db) and os.path.getsize(self.db)):
            check_written(self.db, ".db")
        if min(self.raters, self.every, self.n_asked) < 1:
            numbers = f"{self.raters}, {self.every} and {self.n_asked}"
            raise ValueError(f"Expected `raters`, `every` and `n_asked` to be at least 1, got {numbers}.")
        if self.learned is None and self.kind != "score":
            raise ValueError(f"Expected kind='score' without `learned`, got {self.kind!r}, which gives no numbers.")
        self._standing: StandingAnswers | None = None
        self._asked: dict[str, dict[tuple[str, tuple[str, ...]], int]] = {}  # numbers of questions, by run
        self._n_learned = 0  # the number of answers at the learner's last fit
        self._has_warned = False
        self._learner: Learner | None = None
        if self.learned is not None:
            learner: Any = read_reward(self.learned)
            if not isinstance(learner, Learner):
                raise TypeError(f"Expected `learned` to be a reward with a method `fit`, got {learner!r:.80}.")
            self._learner = learner
            n = sum(answer.value is not None for answer in self._open().update())
            if n < self.every:
                raise ValueError(
                    f"Expected {self.every} answers in {self.db} to learn from (`every`), got {n}: collect them first, "
                    "with textenv rate MODEL --prompts FILE."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_standing": None, "attend": None}  # an open file cannot be pickled

    def _open(self) -> StandingAnswers:
        """Return the answers of the store, which is opened at the first call."""
        if self._standing is None:
            self._standing = StandingAnswers(FeedbackStore(self.db))
        return self._standing

    def _known(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """Return the numbers of the run's questions of this kind and scale, keyed by prompt and texts."""
        if self.run not in self._asked:
            self._asked[self.run] = {
                (question.prompt, question.completions): question.id
                for question in questions_of(self.db, self.run)
                if (question.kind, question.scale) == (self.kind, self.scale)
            }
        return self._asked[self.run]

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Sequence[Score]:
        """Return the rewards of the rows."""
        standing = self._open()
        texts = [(prompt, completion.text) for prompt, completion in zip(prompts, preds, strict=True)]
        if self._learner is None:
            asked = [self._ask(prompt, [text]) for prompt, text in texts]
            with waiting_for_people():
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

    def _ask(self, prompt: Prompt, texts: Sequence[str]) -> int:
        """Return the number of a question, and add the question to the store unless it is there already."""
        known, key = self._known(), (str(prompt), tuple(texts))
        if key not in known:
            options: dict[str, Any] = {"run": self.run, "raters": self.raters, "scale": self.scale}
            known[key] = self._open().store.add(key[0], texts, self.kind, **options, messages=prompt.messages)
        return known[key]

    def _wait(self, items: Collection[int]) -> list[Answer]:
        """Wait until `raters` people have answered or skipped each item, and return the answers that count."""
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
                message = f"waiting for {len(missing)} answers: textenv rate --db {self.db}. This is said once."
                warnings.warn(message, stacklevel=4)
            time.sleep(POLL)


def _means(items: Sequence[int], answers: Sequence[Answer]) -> list[Score]:
    """Return the mean score of each item, or `DROPPED` for an item that everybody skipped."""
    scores: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.kind == "score" and isinstance(answer.value, tuple):
            scores[answer.item].append(float(answer.value[0]))
    return [statistics.fmean(scores[item]) if scores[item] else DROPPED for item in items]


def _questions(
    texts: Sequence[tuple[Prompt, str]], scores: Sequence[Score], kind: Kind, n: int
) -> list[tuple[Prompt, list[str]]]:
    """Return at most `n` questions, prompt and texts, evenly spread from the best mean score to the worst."""
    by_prompt: dict[Prompt, dict[str, float]] = defaultdict(dict)  # the score of each different text
    for (prompt, text), score in zip(texts, scores, strict=True):
        by_prompt[prompt][text] = score if isinstance(score, float) else 0.0
    size, least = GROUP[kind], min(GROUP[kind], 2)  # a single text can be scored, but not compared or ranked
    questions = []
    for prompt, score_of in by_prompt.items():
        distinct = list(score_of)
        groups = [distinct[start : start + size] for start in range(0, len(distinct), size)]
        means = [statistics.fmean(score_of[text] for text in group) for group in groups]
        questions += [(mean, prompt, g) for mean, g in zip(means, groups, strict=True) if len(g) >= least]
    questions.sort(key=lambda question: -question[0])
    if len(questions) > n:
        questions = [questions[i * (len(questions) - 1) // max(n - 1, 1)] for i in range(max(n, 0))]
    return [(prompt, group) for _, prompt, group in questions]
