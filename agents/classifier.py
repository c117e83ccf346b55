"""Train a text classifier, such as `textenv.rewards.classifier.Classifier` takes for a reward."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from textenv.extras import check_extra
from textenv.model_loading import from_config, load_whole
from textenv.rewards.text_model import TextModel

from .backbone import check_fits
from .demo import model_folder
from .interrupted import origin, prepare, work_folder
from .output_folders import check_output, output_folder
from .reward_figures import wilson_interval

LabelledTexts = tuple[Sequence[str], Sequence[int]]  # texts, and the number of each one's label


class ClassifierFigures(NamedTuple):
    """How well a classifier does on labelled texts.

    Args:
        loss: The mean cross-entropy, in nats a text.
        accuracy: The share of texts whose likeliest label is theirs.
        low: Lower bound of its 95 % interval (Wilson).
        high: Upper bound.
        n_texts: How many texts.
    """

    loss: float
    accuracy: float
    low: float
    high: float
    n_texts: int


class ClassifierTraining(NamedTuple):
    """What `train_classifier` made.

    Args:
        folder: The model, with the labels' names in its config, and its tokenizer.
        n_steps: Optimizer steps.
        training: The figures on the training data, at the end.
        held_out: The figures on held-out data, None without any.
    """

    folder: Path
    n_steps: int
    training: ClassifierFigures
    held_out: ClassifierFigures | None


def train_classifier(
    lm: str | os.PathLike[str] | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int],
    folder: str | os.PathLike[str],
    *,
    held_out: LabelledTexts | None = None,
    label_names: Sequence[str] | None = None,
    n_epochs: float = 3.0,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    max_tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> ClassifierTraining:
    """Train any model for sequence classification on labelled texts, and save it.

    Texts are read as the reward `Classifier` reads them, special tokens of the tokenizer included, so that what is
    measured here is what rewards. transformers' `Trainer` runs it, which needs accelerate:
    `pip install "textenv[sft]"`. Signals, resuming and random generators are as in `agents.sft.tune`.

    Args:
        lm: A name or path (a fresh head is put on a model without one of that many labels), or a config, of BERT or
            GPT-2 say, for fresh weights.
        tokenizer: The model's tokenizer.
        texts: What is classified, N of them.
        labels: The number of each text's label, (N,), from 0.
        folder: Where to: a folder that is absent or empty.
        held_out: Texts and labels that are measured and not trained on.
        label_names: The labels' names in the order of their numbers; "LABEL_0" and so on by default.
        n_epochs: Passes over the data; may be a fraction.
        batch_size: Texts of a minibatch.
        learning_rate: The peak of a cosine schedule with a warm-up of a tenth.
        max_tokens: Where a text is longer it loses its end, here and in the reward; what tokenizer and model allow by
            default.
        seed: Of fresh weights, dropout and the order of the data.
        resume: Whether to go on with a run of the same arguments that was interrupted; from the start if there is none.
        overwrite: Whether an earlier classifier in `folder` may be replaced, once the new one is complete.
        progress_bar: Show one.

    Raises:
        ImportError: Without accelerate.
        ValueError: If texts and labels do not match, a label is no number of the names, fewer than two are named, or
            something stands in the folder that would be lost.

    Example:
        >>> from agents import train_classifier
        >>> # bert = "distilbert/distilbert-base-uncased"
        >>> # made = train_classifier(bert, AutoTokenizer.from_pretrained(bert), texts, labels, "mood",
        >>> #                         held_out=(others, their_labels), label_names=["negative", "positive"])
        >>> # print(made.held_out.accuracy); reward = Classifier("mood", label="positive")
    """
    check_output(folder, "classifier", overwrite)  # before the work
    names = [f"LABEL_{i}" for i in range(max(labels, default=0) + 1)] if label_names is None else list(label_names)
    _check_labels("labels", (texts, labels), names)
    if held_out is not None:
        _check_labels("held_out", held_out, names)
    check_extra("sft", "accelerate", "transformers' Trainer")
    from .hf_trainer import random_state_kept, train, training_arguments

    work = work_folder(folder)
    arguments = training_arguments(work, n_epochs, batch_size, learning_rate, seed, progress_bar)
    with random_state_kept():
        torch.manual_seed(seed)
        model = _build(lm, names)
        reader = TextModel(model, tokenizer, max_length=max_tokens, batch_size=batch_size)
        check_fits(model, len(tokenizer), 1)
        rows = list(zip((ids or [reader.pad_id] for ids in reader.encode(texts)), labels, strict=True))
        settings = (origin(model, lm), rows, names, n_epochs, batch_size, learning_rate, seed)
        checkpoint = prepare(work, settings, resume)
        n_steps = train(model, rows, lambda some: _collate(some, reader.pad_id), arguments, checkpoint)
        model.eval()
    training = _measure(reader, texts, labels)
    measured = None if held_out is None else _measure(reader, *held_out)
    reader.tokenizer.model_max_length = reader.max_length
    with output_folder(folder, "classifier", overwrite) as beside:
        model.save_pretrained(beside)
        reader.tokenizer.save_pretrained(beside)
    shutil.rmtree(work)
    return ClassifierTraining(Path(folder), n_steps, training, measured)


def _check_labels(name: str, data: LabelledTexts, names: Sequence[str]) -> None:
    texts, labels = data
    if len(texts) != len(labels) or len(texts) == 0:
        raise ValueError(f"Expected `{name}` for at least one text, got {len(texts)} texts and {len(labels)} labels.")
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"Expected at least two labels of different names, got {list(names)}: give `label_names`.")
    for row, label in enumerate(labels):
        if not isinstance(label, (int, np.integer)) or not 0 <= label < len(names):
            raise ValueError(
                f"Expected the label of row {row} of `{name}` to be a number below {len(names)}, the place of one of "
                f"{list(names)}, got {label!r}."
            )


def _build(lm: str | os.PathLike[str] | PreTrainedConfig, names: Sequence[str]) -> PreTrainedModel:
    """Return a model with these labels, in float32."""
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
    if not isinstance(lm, PreTrainedConfig):
        # A head of another size is not an error: a fresh one is put on.
        labels["ignore_mismatched_sizes"] = True
        labels["dtype"] = torch.float32
        return load_whole(AutoModelForSequenceClassification, model_folder(os.fspath(lm)), fresh_head=True, **labels)
    config = copy.deepcopy(lm)
    for key, value in labels.items():
        setattr(config, key, value)
    return from_config(AutoModelForSequenceClassification, config)


def _collate(rows: Sequence[tuple[list[int], int]], pad_id: int) -> dict[str, Tensor]:
    """Return tokens and which are real, (B, T) each, padded on the right, and labels, (B,)."""
    ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    is_text = torch.arange(ids.shape[1]) < lengths[:, None]
    labels = torch.tensor([int(label) for _, label in rows])
    return {"input_ids": ids, "attention_mask": is_text.long(), "labels": labels}


def _measure(reader: TextModel, texts: Sequence[str], labels: Sequence[int]) -> ClassifierFigures:
    logits = reader.logits(texts).astype(np.float64)  # (N, labels)
    numbers = np.asarray(labels)
    nats = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(numbers)), numbers]
    accuracy = float(np.mean(logits.argmax(axis=1) == numbers))
    return ClassifierFigures(float(nats.mean()), accuracy, *wilson_interval(accuracy, len(numbers)), len(numbers))
