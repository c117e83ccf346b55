"""Answers as lines of JSON, in the forms that training reads: pairs, rankings and scores."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from textenv.feedback.records import Answer
from textenv.feedback.store import FeedbackStore

Form = Literal["pairs", "rankings", "scores"]
FORMS: tuple[str, ...] = get_args(Form)


def rows_of(answers: Iterable[Answer], form: Form) -> Iterator[dict[str, Any]]:
    """Yield the rows that answers make in one form; each says who answered, when, in how many seconds, and the models.

    - "pairs": prompt, chosen, rejected: each pair that a choice, a ranking or unequal scores decide, as in hh-rlhf with
      the prompt in a column of its own. Ties make none.
    - "rankings": prompt, ranking (texts, the best first): rankings, and choices as rankings of two.
    - "scores": prompt, completion, text (the two together), label (the score), scale: one for each score.

    `textenv reward-model --data` reads the first and the last.

    Example:
        >>> answer = Answer(1, 1, "compare", "ann", "It was", (" good.", " bad."), value=0)
        >>> [(row["prompt"], row["chosen"], row["rejected"]) for row in rows_of([answer], "pairs")]
        [('It was', ' good.', ' bad.')]
    """
    if form not in FORMS:
        raise ValueError(f"Expected `form` to be one of {', '.join(FORMS)}, got {form!r}.")
    make: dict[str, Callable[[Answer], Iterator[dict[str, Any]]]] = {
        "pairs": _pairs,
        "rankings": _rankings,
        "scores": _scores,
    }
    for answer in answers:
        origin = {"answer": answer.id, "rater": answer.rater, "run": answer.run}
        timing = {"seconds": answer.seconds, "time": answer.time}
        for row in make[form](answer):
            whole = {"prompt": answer.prompt, **row, **origin, **timing}
            yield {name: value for name, value in whole.items() if value is not None}


def _pairs(answer: Answer) -> Iterator[dict[str, Any]]:
    models = answer.models or (None,) * len(answer.completions)
    for better, worse in answer.pairs():
        texts = {"chosen": answer.completions[better], "rejected": answer.completions[worse]}
        yield {**texts, "chosen_model": models[better], "rejected_model": models[worse]}


def _rankings(answer: Answer) -> Iterator[dict[str, Any]]:
    if answer.kind == "rank" and isinstance(answer.value, tuple):
        places = [int(place) for place in answer.value]
    else:
        places = [place for pair in answer.pairs() for place in pair] if answer.kind == "compare" else []
    if places:
        models = [answer.models[place] for place in places] if any(answer.models) else None
        yield {"ranking": [answer.completions[place] for place in places], "models": models}


def _scores(answer: Answer) -> Iterator[dict[str, Any]]:
    if answer.kind == "score" and isinstance(answer.value, tuple):
        models = answer.models or (None,) * len(answer.completions)
        for text, score, model in zip(answer.completions, answer.value, models, strict=True):
            scored = {"completion": text, "text": answer.prompt + text, "label": score}
            yield {**scored, "scale": list(answer.scale), "model": model}


def export(store: FeedbackStore, path: str | PathLike[str], form: Form, overwrite: bool = False) -> int:
    """Write the answers that count as a file of one JSON object a line, and return how many; see `rows_of`.

    The file appears whole or stays as it was.

    Raises:
        FileExistsError: If there is a file, and it is not said that it may be overwritten.
    """
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(f"Expected a new file, got {target}, which exists: overwrite=True replaces it.")
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(store.answers(), form)]
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(rows)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return len(rows)
