"""Training of text classifiers, for the reward `textenv.rewards.classifier.Classifier` or as judges."""

from __future__ import annotations

import copy
import os
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

from textenv.checks.extras import check_extra
from textenv.huggingface.weights import from_config, load_whole
from textenv.rewards.text_model import TextModel

from ..checkpoints.output_folders import check_output, output_folder
from ..checkpoints.shard_files import replaced_together
from ..distributed.collectives import once
from ..models.backbone import check_fits
from ..small_models.demo_model import model_folder
from .accuracy import wilson_interval
from .resumable import origin, prepare, remove_states, work_folder

LabelledTexts = tuple[Sequence[str], Sequence[int]]  # texts, and the number of each text's label


class ClassifierFigures(NamedTuple):
    """The loss and accuracy of a classifier on labelled texts.

    Args:
        loss: The mean cross-entropy, in nats per text.
        accuracy: The share of texts whose most probable label is the right one.
        low: The lower bound of the accuracy's 95 % interval (Wilson, 1927).
        high: The upper bound.
        n_texts: The number of texts.
    """

    loss: float
    accuracy: float
    low: float
    high: float
    n_texts: int


class ClassifierTraining(NamedTuple):
    """The result of `train_classifier`.

    Args:
        folder: The folder of the model, whose config has the labels' names, and of its tokenizer.
        n_steps: The number of optimizer steps.
        training: The figures on the training data, at the end.
        held_out: The figures on held-out data; None if there is none.
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

    Texts are encoded as the reward `Classifier` encodes them, with the tokenizer's special tokens, so that the accuracy
    measured here is the accuracy of the reward. transformers' `Trainer` runs the training and needs accelerate:
    `pip install "textenv[sft]"`. Signals, resuming and random generators are handled as in `agents.sft.tune`.

    Args:
        lm: A model's name or path (the model gets a fresh head unless its own has that many labels), or a config, for
            example of BERT or GPT-2, for fresh weights.
        tokenizer: The model's tokenizer.
        texts: The N texts to train on.
        labels: The number of each text's label, (N,), from 0.
        folder: The folder to write, absent or empty.
        held_out: Texts and labels that are not trained on, to measure the accuracy.
        label_names: The labels' names in the order of their numbers; by default "LABEL_0", "LABEL_1", ...
        n_epochs: The number of passes over the data; may be a fraction.
        batch_size: The number of texts in a minibatch.
        learning_rate: The peak of a cosine schedule that warms up over the first tenth.
        max_tokens: Longer texts lose their end, here and in the reward; by default the limit of tokenizer and model.
        seed: The seed of fresh weights, dropout and the order of the data.
        resume: Whether to continue an interrupted run of the same arguments; it starts anew if there is none.
        overwrite: Whether an earlier classifier in `folder` may be replaced, once the new one is complete.
        progress_bar: Whether to show a progress bar.

    Returns:
        The folder, and the figures on the training data and on `held_out`.

    Raises:
        ImportError: If accelerate is not installed.
        ValueError: If texts and labels differ in number, a label has no name, fewer than two labels are named, the
            interrupted run had other arguments, or the folder holds files that would be lost.

    Example:
        >>> from agents import train_classifier
        >>> # bert = "distilbert/distilbert-base-uncased"
        >>> # made = train_classifier(bert, AutoTokenizer.from_pretrained(bert), texts, labels, "mood",
        >>> #                         held_out=(others, their_labels), label_names=["negative", "positive"])
        >>> # print(made.held_out.accuracy); reward = Classifier("mood", label="positive")
    """
    check_output(folder, "classifier", overwrite)  # fail now rather than after the training
    names = [f"LABEL_{i}" for i in range(max(labels, default=0) + 1)] if label_names is None else list(label_names)
    _check_labels("labels", (texts, labels), names)
    if held_out is not None:
        _check_labels("held_out", held_out, names)
    check_extra("sft", "accelerate", "transformers' Trainer")
    from .hf_trainer import random_state_kept, train, training_arguments

    work = work_folder(folder)
    arguments = training_arguments(work, n_epochs, batch_size, learning_rate, seed, progress_bar, False)
    with random_state_kept():
        torch.manual_seed(seed)
        model = _build(lm, names)
        reader = TextModel(model, tokenizer, max_length=max_tokens, batch_size=batch_size)
        check_fits(model, len(tokenizer), 1)
        # An empty text is scored as a pad token alone, as in `TextModel`.
        rows = list(zip((ids or [reader.pad_id] for ids in reader.encode(texts)), labels, strict=True))
        settings = (origin(model, lm), rows, names, n_epochs, batch_size, learning_rate, seed)
        checkpoint = prepare(work, settings, resume)
        pad_id = _free_pad_id(reader.pad_id, [ids[-1] for ids, _ in rows], len(tokenizer))
        with reader.padded_with(pad_id):
            n_steps = train(model, rows, lambda batch: _collate(batch, pad_id), arguments, checkpoint)
        model.eval()
    training = _measure(reader, texts, labels)
    measured = None if held_out is None else _measure(reader, *held_out)
    reader.tokenizer.model_max_length = reader.max_length  # the reward cuts texts where the training did
    with replaced_together(output_folder(folder, "classifier", overwrite)) as beside:
        once(lambda: _save(model, reader.tokenizer, beside))
    once(lambda: remove_states(work))
    return ClassifierTraining(Path(folder), n_steps, training, measured)


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
        # transformers' `from_pretrained` then replaces a head of another size by a fresh one; it would raise otherwise.
        labels["ignore_mismatched_sizes"] = True
        labels["dtype"] = torch.float32
        return load_whole(AutoModelForSequenceClassification, model_folder(os.fspath(lm)), fresh_head=True, **labels)
    config = copy.deepcopy(lm)
    for key, value in labels.items():
        setattr(config, key, value)
    return from_config(AutoModelForSequenceClassification, config)


def _free_pad_id(pad_id: int, last_ids: Sequence[int], n_tokens: int) -> int:
    """Return the pad token, or where a text ends with it, the first token with which no text ends.

    A text that ends with the pad token would be scored at an earlier token; see `TextModel.padded_with`.

    Raises:
        ValueError: If texts end with every token.
    """
    taken = set(last_ids)
    free = [token for token in (pad_id, *range(n_tokens)) if token not in taken]
    if not free:
        raise ValueError("Expected a pad token with which no text ends, got texts that end with every token.")
    return free[0]


def _collate(rows: Sequence[tuple[list[int], int]], pad_id: int) -> dict[str, Tensor]:
    """Return tokens and attention mask, (B, T) each, padded on the right, and labels, (B,)."""
    ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=pad_id)  # (B, T)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    is_text = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T)
    labels = torch.tensor([int(label) for _, label in rows])
    return {"input_ids": ids, "attention_mask": is_text.long(), "labels": labels}


def _measure(reader: TextModel, texts: Sequence[str], labels: Sequence[int]) -> ClassifierFigures:
    logits = reader.logits(texts).astype(np.float64)  # (N, K) for K labels
    numbers = np.asarray(labels)  # (N,)
    nats = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(numbers)), numbers]  # (N,) cross-entropies
    accuracy = float(np.mean(logits.argmax(axis=1) == numbers))
    return ClassifierFigures(float(nats.mean()), accuracy, *wilson_interval(accuracy, len(numbers)), len(numbers))
