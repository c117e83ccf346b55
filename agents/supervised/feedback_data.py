"""People's answers as training data of a reward model: rankings or labelled texts."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from textenv.feedback.asked import StandingAnswers
from textenv.feedback.records import Answer
from textenv.feedback.store import FeedbackStore

from ..errors import CommandError
from .preferences import Labelled, Ranking

Examples = list[Ranking] | list[Labelled]
HELD_OUT = 10  # one prompt in so many is held out


class Feedback(NamedTuple):
    """The answers of a store, split by prompt into training data and held-out data."""

    data: Examples
    held_out: Examples


def read_feedback(path: str, everything: bool = False) -> Feedback:
    """Read people's answers, and hold out a tenth of the prompts, always the same ones.

    Args:
        path: The file of the store.
        everything: Whether to train on all answers and hold out none.

    Raises:
        CommandError: If there is no such store.
        ValueError: If no answer says which text is better, or the scores are of several scales.
    """
    if not Path(path).is_file():
        raise CommandError(f"Expected a store of feedback, as `textenv rate` makes it, got no file {path}.")
    with FeedbackStore(path) as store:
        answers = StandingAnswers(store).update()
    # Sorted by a hash: the same prompts are held out each time, in whatever order the store was filled.
    prompts = sorted({answer.prompt for answer in answers}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    chosen = set() if everything else set(prompts[: len(prompts) // HELD_OUT])
    data = examples_of([answer for answer in answers if answer.prompt not in chosen])
    rest = [answer for answer in answers if answer.prompt in chosen]
    if isinstance(data[0], Ranking):
        return Feedback(data, rankings_of(rest))
    labelled = labels_of(rest)
    # The accuracy is measured on pairs of different labels: without any, there is nothing to measure.
    return Feedback(data, labelled if len({text.label for text in labelled}) > 1 else [])


def examples_of(answers: Sequence[Answer]) -> Examples:
    """Return rankings if people compared or ranked texts, else texts labelled with the mean of their scores.

    Raises:
        ValueError: If no answer says which text is better.

    Example:
        >>> examples_of([Answer(1, 1, "compare", "ann", "It was", (" bad.", " good."), value=1)])
        [Ranking(texts=(' good.', ' bad.'), prompt='It was', margin=0.0, is_chat=False)]
        >>> examples_of([Answer(1, 1, "score", "ann", "It was", (" good.",), value=(4.0,))])
        [Labelled(text='It was good.', label=4.0)]
    """
    has_comparisons = any(answer.kind in ("compare", "rank") and answer.pairs() for answer in answers)
    examples: Examples = rankings_of(answers) if has_comparisons else labels_of(answers)
    if not examples:
        raise ValueError(f"Expected answers that say which text is better, got none in {len(answers)} answers.")
    return examples


def rankings_of(answers: Sequence[Answer]) -> list[Ranking]:
    """Return comparisons and rankings; two texts of a prompt that a rater scored differently are a comparison, too."""
    rankings = []
    # By rater, prompt and scale: the score of each text.
    scored: dict[tuple[str, str, tuple[float, float]], dict[str, float]] = defaultdict(dict)
    for answer in answers:
        if answer.kind == "rank" and isinstance(answer.value, tuple):
            rankings.append(Ranking(tuple(answer.completions[int(index)] for index in answer.value), answer.prompt))
        elif answer.kind == "score" and isinstance(answer.value, tuple):
            texts = scored[answer.rater, answer.prompt, answer.scale]
            texts.update(zip(answer.completions, answer.value, strict=True))
        else:
            for better, worse in answer.pairs():
                rankings.append(Ranking((answer.completions[better], answer.completions[worse]), answer.prompt))
    for (_, prompt, _), texts in scored.items():
        for (text, score), (other, other_score) in itertools.combinations(texts.items(), 2):
            if score != other_score:
                rankings.append(Ranking((text, other) if score > other_score else (other, text), prompt))
    return rankings


def labels_of(answers: Sequence[Answer]) -> list[Labelled]:
    """Return the scored texts, prompt included, each with the mean of its scores.

    Raises:
        ValueError: If the scores are of several scales.
    """
    scales = sorted({answer.scale for answer in answers if answer.kind == "score"})
    if len(scales) > 1:
        raise ValueError(f"Expected scores of one scale, got scales {', '.join(map(str, scales))}: train on one each.")
    scores_of: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.kind == "score" and isinstance(answer.value, tuple):
            for text, score in zip(answer.completions, answer.value, strict=True):
                scores_of[answer.prompt + text].append(float(score))
    return [Labelled(text, statistics.fmean(scores)) for text, scores in scores_of.items()]
