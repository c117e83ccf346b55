"""Hugging Face text classifiers as rewards. The module needs torch, so `textenv.rewards` does not import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from textenv.episodes.completion import Preds
from textenv.episodes.scores import ScoreAt
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, Reads, check_choice
from textenv.rewards.text_model import ModelLike, TextModel
from textenv.rewards.text_reader import Scored


@dataclass
class Classifier(BatchReward):
    """A text classifier's score of a wanted label: its probability, its logit, or whether it is the likeliest label.

    The model reads the text through its own tokenizer, never the policy's token ids: `TextReader` says with which
    special tokens. For padding and truncation see `TextModel`.

    With `label_column="intent", output="label"` this is the intent reward of OpenRL and RL4LMs: 1 where the predicted
    intent of the reply is the labelled one.

    Args:
        model: A name on the hub, the path of a folder, or a model in this process (with `tokenizer`).
        label: The wanted label: a name in the model's `config.id2label`, or its number.
        label_column: The column of the prompt's row that holds its own wanted label, instead of `label`.
        output: "probability", "logit", or "label": 1.0 if the label is the likeliest, else 0.0. Probabilities add up
            to 1 over the labels (softmax), except for a model of one label or of `problem_type`
            "multi_label_classification", where each label has its own (sigmoid), as in transformers'
            `TextClassificationPipeline`.
        reads: "completion" scores the completion alone, "whole" the prompt and the completion as one text, or, if the
            prompt is a chat and the tokenizer has a chat template, as one conversation.
        tokenizer: The model's own tokenizer, for a model in this process.
        max_length: The most tokens of a text; longer texts are truncated, with one warning.
        truncation_side: The side on which longer texts lose tokens.
        batch_size: The most texts in a forward pass.
        device: The device of the model; None leaves it where it is (the CPU for a model loaded by name).
        dtype: The dtype of the weights, such as "bfloat16"; None for float32 where they are loaded by name, and for no
            change to a model in this process.
        score_at: "rollout_end" scores the texts of a rollout together, "done" each text when it ends.

    Raises:
        ValueError: If the model has no such label, or both or neither of `label` and `label_column` are given, or
            output="label" is asked of a model with a single label.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from agents import word_tokenizer
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=4)
        >>> names = {0: "negative", 1: "positive"}
        >>> model = BertForSequenceClassification(BertConfig(**shape, id2label=names))
        >>> reward = Classifier(model, label="positive", tokenizer=word_tokenizer(["good", "film"]))
        >>> 0 < reward(Prompt("a"), Preds(CharTokenizer("ab"), [1, 2]), True) < 1
        True
    """

    model: ModelLike = field(repr=False)
    label: str | int | None = None
    label_column: str | None = None
    output: Literal["probability", "logit", "label"] = "probability"
    reads: Reads = "completion"
    tokenizer: Any = field(default=None, repr=False)
    max_length: int | None = None
    truncation_side: Literal["left", "right"] = "right"
    batch_size: int = 32
    device: Any = None
    dtype: Any = None
    score_at: ScoreAt = "rollout_end"

    def __post_init__(self) -> None:
        check_choice("output", self.output, ("probability", "logit", "label"))
        check_choice("reads", self.reads, ("completion", "whole"))
        check_choice("score_at", self.score_at, ("done", "rollout_end"))
        if (self.label is None) == (self.label_column is None):
            raise ValueError(f"Expected either `label` or `label_column`, got {self.label!r}, {self.label_column!r}.")
        self._model = TextModel(
            self.model,
            self.tokenizer,
            max_length=self.max_length,
            truncation_side=self.truncation_side,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
        )
        config = self._model.model.config
        self._numbers = {str(name): int(number) for number, name in config.id2label.items()}
        # The rule of transformers `TextClassificationPipeline.postprocess` for sigmoid in place of softmax.
        self._is_separate = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        if self.output == "label" and config.num_labels == 1:
            raise ValueError("Expected a model of several labels for output='label', got one with one.")
        if self.label is not None:
            self._number(self.label)

    def _number(self, label: Any) -> int:
        n_labels = len(self._numbers)
        if isinstance(label, str) and label in self._numbers:
            return self._numbers[label]
        if isinstance(label, (int, np.integer)) and 0 <= label < n_labels:
            return int(label)
        raise ValueError(f"Expected a label of {list(self._numbers)}, or a number below {n_labels}, got {label!r}.")

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return the score of each row."""
        is_whole, whole = self.reads == "whole", self._model.reader.whole
        texts = [whole(prompt, own) if is_whole else own.text for prompt, own in zip(prompts, preds, strict=True)]
        wanted = [self.label if self.label_column is None else prompt.row[self.label_column] for prompt in prompts]
        return self.judge(texts, wanted)

    def judge(self, texts: Sequence[Scored], wanted: Sequence[Any]) -> list[float]:
        """Return the score of each text for its wanted label, a name or a number."""
        labels = np.array([self._number(label) for label in wanted])
        logits = self._model.logits(texts).astype(np.float64)  # (B, labels)
        if self.output == "label":
            return (logits.argmax(1) == labels).astype(float).tolist()
        chosen = logits[np.arange(len(texts)), labels]  # (B,)
        if self.output == "logit":
            return chosen.tolist()
        # The logarithm of the denominator of the sigmoid or softmax, (B,).
        total = np.logaddexp(chosen, 0.0) if self._is_separate else np.logaddexp.reduce(logits, axis=1)
        return np.exp(chosen - total).tolist()
