"""Trained reward models as rewards. The module needs torch, so `textenv.rewards` does not import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from textenv.episodes.completion import Preds
from textenv.episodes.scores import ScoreAt
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, Reads, check_choice
from textenv.rewards.reward_stats import RewardStats
from textenv.rewards.text_model import ModelLike, TextModel
from textenv.rewards.text_reader import Scored


@dataclass
class Preference(BatchReward):
    """The score of a trained reward model: `AutoModelForSequenceClassification` with `num_labels=1`.

    The model reads the text through its own tokenizer, never the policy's token ids, and as it read the texts of its
    training: with BOS once, and with the same tokens at the end (`TextReader`). For padding and truncation see
    `TextModel`. `Ensemble([...], by="minimum")` joins several into one reward.

    Args:
        model: A name on the hub, the path of a folder, or a model in this process (with `tokenizer`).
        chat: Whether a text prompt is put into the tokenizer's chat template as the user's message, and the completion
            as the answer; a reply of the env is the user's next turn. Prompts that are chats do not need it: their
            messages are the first turns, unless `train_reward_model` trained the model on texts.
        messages_column: With `chat`, the column of the prompt's row with the messages before the completion, a list of
            {"role": ..., "content": ...}; None takes the messages of a chat, or the prompt as the user's message.
        stats: The statistics that normalise the score to (score - mean) / std: a `RewardStats`, "stored" for those in
            the model's folder, or None for the score as it is.
        reads: Without `chat`, "whole" scores prompt and completion as one text, "completion" the completion alone.
        tokenizer: The model's own tokenizer, for a model in this process.
        max_length: The most tokens of a text; longer texts are truncated, with one warning.
        truncation_side: The side on which longer texts lose tokens; "left" keeps the completion.
        batch_size: The most texts in a forward pass.
        device: The device of the model; None leaves it where it is (the CPU for a model loaded by name).
        dtype: The dtype of the weights, such as "bfloat16"; None for float32 where they are loaded by name, and for no
            change to a model in this process.
        score_at: "rollout_end" scores the texts of a rollout together, "done" each text when it ends.

    Raises:
        ValueError: If the model has several labels, or `chat` is set and the tokenizer has no chat template.
        FileNotFoundError: If stats="stored" and the model's folder has no statistics.

    Example:
        >>> from transformers import GPT2Config, GPT2ForSequenceClassification
        >>> from agents import word_tokenizer
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> config = GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, num_labels=1)
        >>> model, tokenizer = GPT2ForSequenceClassification(config), word_tokenizer(["good", "film"])
        >>> prompt, preds = Prompt("good "), Preds(CharTokenizer(), CharTokenizer().encode("film"))
        >>> score = Preference(model, tokenizer=tokenizer)(prompt, preds, True)
        >>> normal = Preference(model, tokenizer=tokenizer, stats=RewardStats(mean=1.0, std=2.0))(prompt, preds, True)
        >>> abs(normal - (score - 1.0) / 2.0) < 1e-9
        True
    """

    model: ModelLike = field(repr=False)
    chat: bool = False
    messages_column: str | None = None
    stats: RewardStats | Literal["stored"] | None = None
    reads: Reads = "whole"
    tokenizer: Any = field(default=None, repr=False)
    max_length: int | None = None
    truncation_side: Literal["left", "right"] = "left"  # keeps the end of the text: the completion, which is scored
    batch_size: int = 32
    device: Any = None
    dtype: Any = None
    score_at: ScoreAt = "rollout_end"

    def __post_init__(self) -> None:
        check_choice("reads", self.reads, ("completion", "whole"))
        check_choice("score_at", self.score_at, ("done", "rollout_end"))
        self._model = TextModel(
            self.model,
            self.tokenizer,
            max_length=self.max_length,
            truncation_side=self.truncation_side,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
        )
        n_labels = self._model.model.config.num_labels
        if n_labels != 1:  # transformers' default is 2, where a config says nothing of labels
            raise ValueError(f"Expected a reward model with one score (num_labels=1), got {n_labels} labels.")
        if self.messages_column is not None and not self.chat:
            raise ValueError("Expected chat=True where `messages_column` is given.")
        if self.chat and self._model.tokenizer.chat_template is None:
            raise ValueError("Expected a tokenizer with a chat template for chat=True, got one without.")
        self._stats = self._read_stats()

    def _read_stats(self) -> RewardStats | None:
        if self.stats is None or isinstance(self.stats, RewardStats):
            return self.stats
        check_choice("stats", self.stats, ("stored",))
        if isinstance(self.model, PreTrainedModel):
            raise ValueError("Expected stats=RewardStats(mean, std) for a model in this process, got 'stored'.")
        return RewardStats.load(self.model)

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return the score of each row."""
        texts = [self._whole(*row) for row in zip(prompts, preds, strict=True)]
        scores = self._model.logits(texts)[:, 0].astype(np.float64).tolist()  # from (B, 1)
        return scores if self._stats is None else [self._stats.normalised(score) for score in scores]

    def text(self, prompt: Prompt, preds: Preds) -> str:
        """Return the text that the model reads for a row."""
        return self._model.reader.text(self._whole(prompt, preds))

    def _whole(self, prompt: Prompt, preds: Preds) -> Scored:
        if self.reads == "completion" and not self.chat:
            return preds.text
        return self._model.reader.whole(prompt, preds, self.chat, self.messages_column)
