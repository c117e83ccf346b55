"""Export of answers as lines of JSON: pairs, rankings or scores, the forms on which reward models are trained."""

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
    """Yield the rows of all answers in a form, each with its rater, run, models, seconds and time where known.

    A prompt that is a chat is the text that its template wrote, and the column `messages` has its messages.

    - "pairs": prompt, chosen, rejected; one row for each pair that a choice, a ranking or unequal scores decide. The
      columns are those of hh-rlhf, with the prompt in a column of its own. Ties yield no row.
    - "rankings": prompt, ranking (the texts, best first); one row for each ranking, and for each choice, a ranking of
      two texts.
    - "scores": prompt, completion, text (prompt and completion together), label (the score), scale; one row for each
      score.

    `textenv reward-model --data` reads "pairs" and "scores".

    Args:
        answers: The answers, as from `FeedbackStore.answers`.
        form: "pairs", "rankings" or "scores".

    Raises:
        ValueError: If the form is unknown.

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
            columns = {"prompt": answer.prompt, "messages": answer.messages, **row, **origin, **timing}
            yield {name: value for name, value in columns.items() if value is not None}


def _pairs(answer: Answer) -> Iterator[dict[str, Any]]:
    models = answer.models or (None,) * len(answer.completions)  # `rows_of` leaves out columns that are None
    for better, worse in answer.pairs():
        texts = {"chosen": answer.completions[better], "rejected": answer.completions[worse]}
        yield {**texts, "chosen_model": models[better], "rejected_model": models[worse]}


def _rankings(answer: Answer) -> Iterator[dict[str, Any]]:
    if answer.kind == "rank" and isinstance(answer.value, tuple):  # a tie or skip leaves `order` empty
        order = [int(index) for index in answer.value]
    else:
        order = [index for pair in answer.pairs() for index in pair] if answer.kind == "compare" else []
    if order:
        models = [answer.models[index] for index in order] if any(answer.models) else None
        yield {"ranking": [answer.completions[index] for index in order], "models": models}


def _scores(answer: Answer) -> Iterator[dict[str, Any]]:
    if answer.kind == "score" and isinstance(answer.value, tuple):
        models = answer.models or (None,) * len(answer.completions)
        for text, score, model in zip(answer.completions, answer.value, models, strict=True):
            scored = {"completion": text, "text": answer.prompt + text, "label": score}
            yield {**scored, "scale": list(answer.scale), "model": model}


def export(store: FeedbackStore, path: str | PathLike[str], form: Form, overwrite: bool = False) -> int:
    """Write the answers that count to a file with one JSON object per line, and return the number of lines.

    The file is never half-written: if the export fails, a file of that name stays as it was.

    Args:
        store: The answers.
        path: The file.
        form: The form of the rows: "pairs", "rankings" or "scores"; see `rows_of`.
        overwrite: Whether to replace an existing file.

    Raises:
        FileExistsError: If the file exists and `overwrite` is False.
    """
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(f"Expected a new file, got {target}, which exists: overwrite=True replaces it.")
    # Written beside the target and renamed, so that a crash leaves no half-written file.
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(store.answers(), form)]
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(rows)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return len(rows)
