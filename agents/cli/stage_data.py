"""The data of `sft`, `classifier` and `reward-model`: the rows of files, or a task's data set, split in two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from textenv.adapters.reasoning_gym import ReasoningItems
from textenv.checks.lines import check_encodable
from textenv.checks.signatures import check_arguments
from textenv.prompts.chat import is_chat
from textenv.prompts.dialogues import ASSISTANT, REPLIES, split_pair
from textenv.prompts.parts import Part
from textenv.prompts.prompts import read_rows
from textenv.tasks import dailydialog, hh, reviews, zh_reviews
from textenv.tasks.random_texts import MAKERS, random_texts
from textenv.text.tokenizer import Tokenizer

from ..errors import CommandError
from ..small_models.tokenizers import EOS_TOKEN
from ..supervised.feedback_data import read_feedback
from ..supervised.preferences import Labelled, Ranking, chat_pair
from ..supervised.sft_data import Text
from .options import RewardModelConfig, SFTConfig, StageConfig

SOLVED = "ReasoningGym"  # the task whose texts are made of its own arguments
N_RANDOM_TEXTS = 6_000  # random texts for a task without a data set, a tenth of them held out; they take a second


class Rows(NamedTuple):
    """Rows to train on, and held-out rows to evaluate on."""

    train: list[Any]
    held_out: list[Any]


class Label(NamedTuple):
    """A text and the name of its label."""

    text: str
    label: str


def read_texts(config: SFTConfig) -> Rows:
    """Return texts, or (prompt, reference) pairs, as `agents.sft.tune` takes them.

    Raises:
        CommandError: If a row is neither, or the task has no texts.
    """
    if config.task == SOLVED:
        return _solved(config)
    if config.task_args:
        got = f"with --task {config.task}" if config.task else "without a task"
        raise CommandError(f"Expected task_args with --task {SOLVED} only, got them {got}.")
    if config.task is not None:
        return _of_task(config, config.task, TEXTS)
    return _of_files(config, lambda row, where: _text(row, where, config))


def read_labels(config: StageConfig) -> Rows:
    """Return texts with the names of their labels, as `Label`s.

    Raises:
        CommandError: If a row has other columns, or the task has no labels.
    """
    if config.task is not None:
        return _of_task(config, config.task, LABELS)
    return _of_files(config, _label)


def read_preferences(config: RewardModelConfig, tokenizer: Tokenizer) -> Rows:
    """Return rankings of texts, for example of hh-rlhf, or texts with a number each.

    Args:
        config: The configuration.
        tokenizer: The tokenizer, whose chat template renders pairs of conversations.

    Raises:
        CommandError: If a row has other columns, the task has no preferences, the store of feedback does not exist, or
            a half of the data is empty.
    """
    rows = _all_preferences(config, tokenizer)
    if config.half is None:
        return rows
    middle = len(rows.train) // 2
    half = rows.train[:middle] if config.half == "first" else rows.train[middle:]
    if not half:
        raise CommandError(f"Expected at least two examples with half={config.half}, got {len(rows.train)}.")
    return rows._replace(train=half)


def _all_preferences(config: RewardModelConfig, tokenizer: Tokenizer) -> Rows:
    if config.from_feedback is not None:
        if config.data is not None or config.task is not None:
            raise CommandError("Expected --from-feedback in the place of --data and --task, got both.")
        feedback = read_feedback(config.from_feedback, everything=config.held_out is not None)
        held_out = _preferences(config.held_out, config.encoding, tokenizer)
        return Rows(list(feedback.data), held_out or list(feedback.held_out))
    if config.task is not None:
        return _of_task(config, config.task, PREFERENCES)
    return Rows(*(_preferences(path, config.encoding, tokenizer) for path in (config.data, config.held_out)))


def _solved(config: SFTConfig) -> Rows:
    if config.data is not None or config.held_out is not None:
        raise CommandError(f"Expected no `data` and no `held_out` for the task {SOLVED}, which makes its items itself.")
    check_arguments(ReasoningItems, config.task_args, f"task_args of the task {SOLVED}")
    items = ReasoningItems(**config.task_args)
    return Rows(items.solved("train"), items.solved("held_out"))


def _of_task(config: StageConfig, task: str, readers: Mapping[str, Callable[..., Any]]) -> Rows:
    if task not in readers:
        known = [*readers, SOLVED] if readers is TEXTS else readers
        raise CommandError(f"Expected `task` to be one of {', '.join(known)} for this stage, got {task!r}.")
    if config.held_out is not None:
        raise CommandError("Expected `held_out` without `task`, which holds out a tenth itself, got both.")
    if config.data is None and task not in MAKERS:
        raise CommandError(f"Expected --data FOLDER, the data set of the task {task}, got none.")
    return Rows(*(list(readers[task](config.data, part)) for part in get_args(Part)))  # "train", then "held_out"


def _of_files(config: StageConfig, read: Callable[[Any, str], Any]) -> Rows:
    both = [file_rows(path, config.encoding) if path else [] for path in (config.data, config.held_out)]
    named = zip(both, (config.data, config.held_out), strict=True)
    return Rows(*([read(row, f"row {number} of {path}") for number, row in enumerate(rows, 1)] for rows, path in named))


def file_rows(path: str, encoding: str) -> list[Any]:
    """Return the rows of a .txt, .jsonl, .json or .csv file of an encoding.

    Raises:
        CommandError: If the file does not exist, cannot be read or is empty.
    """
    try:
        rows = list(read_rows(path, encoding)) if Path(path).is_file() else None
    except (OSError, ValueError) as error:
        raise CommandError(f"Expected rows in {path}, got: {error}") from error
    if not rows:
        raise CommandError(f"Expected rows in {path}, got {'no such file' if rows is None else 'none'}.")
    return rows


def _text(row: Any, where: str, config: SFTConfig) -> Text:
    prompt, reference, text = config.prompt_column, config.reference_column, config.text_column
    if not isinstance(row, Mapping):
        return text_of({text: str(row)}, text, where)
    if {prompt, reference} <= row.keys():
        asked = row[prompt] if is_chat(row[prompt]) else text_of(row, prompt, where)
        return asked, text_of(row, reference, where)
    if text in row:
        return text_of(row, text, where)
    raise CommandError(f"Expected {prompt} and {reference}, or {text}, in {where}, got {sorted(map(str, row))}.")


def _label(row: Any, where: str) -> Label:
    if not isinstance(row, Mapping) or not {"text", "label"} <= row.keys():
        columns = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise CommandError(f"Expected text and label in {where}, got {columns}.")
    if row["label"] in (None, ""):
        raise CommandError(f"Expected a label in the column label of {where}, got {row['label']!r}.")
    return Label(text_of(row, "text", where), str(row["label"]))


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return the text in a column of a row.

    Args:
        row: The row.
        column: The column.
        where: The name of the row, for the message.

    Raises:
        CommandError: If the value is not a text, as in a line of a .csv that is too short, which has None there; or
            if it has a lone surrogate.
    """
    value = row[column]
    if not isinstance(value, str):
        raise CommandError(f"Expected a text in the column {column} of {where}, got {value!r:.80}.")
    try:
        check_encodable(value, f"the column {column} of {where}")
    except ValueError as error:
        raise CommandError(str(error)) from error
    return value


def _number_of(row: Mapping[str, Any], column: str, where: str) -> float:
    value = row[column]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise CommandError(
            f"Expected a number in the column {column} of {where}, got {value!r:.80}: a reward model learns scores; "
            "textenv classifier learns labels by name."
        )
    return number


def _preferences(path: str | None, encoding: str, tokenizer: Tokenizer) -> list[Any]:
    if path is None:
        return []
    rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in file_rows(path, encoding)]
    row_names = [f"row {number} of {path}" for number in range(1, len(rows) + 1)]
    columns = set.intersection(*(set(row) for row in rows)) if rows else set()
    if {"text", "label"} <= columns:
        named = zip(rows, row_names, strict=True)
        return [Labelled(text_of(row, "text", where), _number_of(row, "label", where)) for row, where in named]
    if not {"chosen", "rejected"} <= columns:
        pairs = ({"text", "label"}, {"chosen", "rejected"})
        bad = next((number for number, row in enumerate(rows) if not any(pair <= row.keys() for pair in pairs)), None)
        # If no single row is bad, some rows have one pair of columns and others the other pair.
        where, present = (path, columns) if bad is None else (row_names[bad], rows[bad])
        raise CommandError(
            f"Expected chosen and rejected, or text and label, in {where}, got {sorted(map(str, present))}."
        )
    # hh-rlhf has no column of prompts: both texts of a row begin with the whole dialogue.
    is_hh = "prompt" not in columns and all(ASSISTANT in str(row["chosen"]) for row in rows)
    named = zip(rows, row_names, strict=True)
    try:
        return [_pair(row, where, tokenizer, is_hh) for row, where in named]
    except ValueError as error:
        raise CommandError(str(error)) from error


def _pair(row: Mapping[str, Any], where: str, tokenizer: Tokenizer, is_hh: bool) -> Ranking:
    if any(isinstance(row.get(column), list) for column in ("prompt", *REPLIES)):
        return chat_pair(row, tokenizer, where)
    for column in REPLIES:
        if not text_of(row, column, where):
            raise CommandError(f"Expected a text in the column {column} of {where}, got an empty one.")
    if is_hh:
        pair = split_pair(row, where)
        return Ranking((pair.chosen, pair.rejected), pair.prompt)
    return Ranking((row["chosen"], row["rejected"]), text_of(row, "prompt", where) if "prompt" in row else "")


def _review_texts(data: str, part: Part) -> list[Text]:
    return [review.text for review in reviews.part_of(reviews.read_reviews(data), part)]


def _review_labels(data: str, part: Part) -> list[Label]:
    labelled = reviews.part_of(reviews.read_reviews(data), part)
    return [Label(review.text, reviews.LABELS[review.label]) for review in labelled]


def _dialogues(data: str, part: Part) -> Sequence[dailydialog.Dialogue]:
    return dailydialog.split_dialogues(dailydialog.read_dialogues(data))[get_args(Part).index(part)]


def _dialogue_texts(data: str, part: Part) -> list[Text]:
    return ["".join(f"{turn}\n" for turn in dialogue.turns) for dialogue in _dialogues(data, part)]


def _dialogue_labels(data: str, part: Part) -> list[Label]:
    return [
        Label(turn, dailydialog.INTENTS[intent])
        for dialogue in _dialogues(data, part)
        for turn, intent in zip(dialogue.turns, dialogue.intents, strict=True)
    ]


def _chosen_replies(data: str, part: Part) -> list[Text]:
    return [pair.prompt + pair.chosen for pair in hh.part_of(hh.read_pairs(data), part)]


def _pairs(data: str, part: Part) -> list[Ranking]:
    return [Ranking((pair.chosen, pair.rejected), pair.prompt) for pair in hh.part_of(hh.read_pairs(data), part)]


def _zh_texts(data: str, part: Part) -> list[Text]:
    rankings = zh_reviews.part_of(zh_reviews.read_rankings(data), part)
    # As (prompt, reference) pairs, since `encode_sample` cuts the end of a long reference; it would split a long text
    # into pieces that begin in the middle of a sentence.
    return [(text[:1], text[1:]) for ranking in rankings for text in ranking]


def _zh_rankings(data: str, part: Part) -> list[Ranking]:
    return [Ranking(ranking) for ranking in zh_reviews.part_of(zh_reviews.read_rankings(data), part)]


def _random(task: str) -> Callable[[str | None, Part], list[Text]]:
    def read(data: str | None, part: Part) -> list[Text]:
        texts = random_texts(task, N_RANDOM_TEXTS)
        n_held_out = N_RANDOM_TEXTS // 10
        # An end token first, as in GPT-2's own training, where it separates a text from the previous one.
        return [EOS_TOKEN + text for text in (texts[:n_held_out] if part == "held_out" else texts[n_held_out:])]

    return read


TEXTS: dict[str, Callable[..., list[Text]]] = {
    "Reviews": _review_texts,
    "DailyDialog": _dialogue_texts,
    "HH": _chosen_replies,
    "ZhReviews": _zh_texts,
    **{task: _random(task) for task in MAKERS},
}
LABELS = {"Reviews": _review_labels, "DailyDialog": _dialogue_labels}
PREFERENCES = {"HH": _pairs, "ZhReviews": _zh_rankings}
LABEL_NAMES = {"Reviews": reviews.LABELS, "DailyDialog": dailydialog.INTENTS}
