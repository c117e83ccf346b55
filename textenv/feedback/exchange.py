"""Answers as lines of JSON, in the forms that training reads: pairs, rankings and scores."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from textenv.dialogues import split_pair
from textenv.feedback.records import Answer, Record
from textenv.feedback.store import FeedbackStore
from textenv.prompts import read_rows

Form = Literal["pairs", "rankings", "scores"]
FORMS: tuple[str, ...] = get_args(Form)
IMPORTED = "imported"  # the rater of rows that name none


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


def import_rows(
    store: FeedbackStore, source: str | PathLike[str] | Iterable[Mapping[str, Any]], scale: tuple[float, float] = (1, 5)
) -> int:
    r"""Write rows in the forms that `rows_of` yields into a store, as questions that are answered, and return how many.

    A row with chosen and rejected is a choice; one with ranking, a ranking; one with label and completion or text, a
    score. Without a prompt chosen and rejected are dialogues of hh-rlhf, which are split behind the last
    "\n\nAssistant:" that they share.

    Args:
        store: Where to.
        source: A .jsonl file, or the rows.
        scale: The lowest and the highest score, for rows without their own.

    Raises:
        ValueError: If a row has none of the forms, or its answer is none; nothing is written then.
    """
    rows = read_rows(source) if isinstance(source, str | PathLike) else list(source)
    return len(store.record(_record(row, f"row {number}", scale) for number, row in enumerate(rows, start=1)))


def _record(row: Mapping[str, Any], where: str, scale: tuple[float, float]) -> Record:
    if not isinstance(row, Mapping):
        raise ValueError(f"Expected {where} to be an object, got {row!r:.80}.")
    more: dict[str, Any] = {name: row.get(name) for name in ("run", "seconds", "time")}
    prompt, rater = row.get("prompt", ""), row.get("rater", IMPORTED)
    if {"chosen", "rejected"} <= row.keys():
        texts = [row["chosen"], row["rejected"]]
        if "prompt" not in row:
            prompt, *texts = split_pair(row, where)
        models = [row.get("chosen_model"), row.get("rejected_model")]
        return Record("compare", prompt, texts, 0, rater, models=models, **more)
    if "ranking" in row:
        ranking = row["ranking"]
        order = range(len(ranking)) if isinstance(ranking, list) else ()
        return Record("rank", prompt, ranking, list(order), rater, models=row.get("models"), **more)
    if "label" in row and ("completion" in row or "text" in row):
        text = row["completion"] if "completion" in row else row["text"]
        prompt = prompt if "completion" in row else ""
        more |= {"models": [row.get("model")], "scale": row.get("scale", scale)}
        return Record("score", prompt, [text], [row["label"]], rater, **more)
    raise ValueError(
        f"Expected {where} to have chosen and rejected, or ranking, or label with completion or text, got "
        f"{sorted(row)}."
    )
