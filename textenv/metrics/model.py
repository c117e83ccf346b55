"""Metrics by a model that stands outside: how probable it finds the texts, and what it takes them for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from textenv.metrics.scores import Scores, mean_of
from textenv.model_loading import n_positions
from textenv.prompts import Prompt
from textenv.tokenizer import Tokenizer, encode_prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from textenv.rewards.text_model import ModelLike


class Tokens(NamedTuple):
    """What the model reads of a row, and from which place on the tokens are the text's."""

    ids: list[int]
    start: int


def perplexity(sums: np.ndarray) -> float:
    """Return exp(nats / tokens) of the sums of both; nan without tokens."""
    return float(np.exp(sums[0] / sums[1])) if sums[1] else math.nan


class Perplexity:
    """The perplexity of the texts, given their prompts, under a causal language model.

    exp of the mean negative log-likelihood over all tokens of all texts, in the model's own tokens: it reads prompt and
    text as texts, so its tokenizer may be another than the policy's. The tokens of the prompt are read and not counted,
    and neither is an end token. Where prompt and text share a token, it counts. The first token of a text whose prompt
    is empty counts only behind a token that the tokenizer puts in front.

    A row that is too long loses the start of its prompt. Figures under two models, or two tokenizers, cannot be
    compared.

    Args:
        model: A causal model of transformers, on any device; it is read in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        name: The figure's name.
        max_tokens: The most tokens of a row; None for the model's positions.
        batch_tokens: The most tokens of a forward, padding included.

    Raises:
        ValueError: If a text alone is longer than `max_tokens`.

    Example:
        >>> from textenv.metrics import Perplexity
        >>> # evaluate(model, prompts, tokenizer, [Perplexity(AutoModelForCausalLM.from_pretrained("gpt2"), gpt2)])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        name: str = "perplexity",
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_tokens = n_positions(model.config) if max_tokens is None else max_tokens
        self.batch_tokens = batch_tokens

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the perplexity of all texts."""
        tokens = [self._read(prompt, text, row) for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]
        rows = np.array([[0.0, max(len(one.ids) - one.start, 0)] for one in tokens])  # (N, 2)
        order = sorted((row for row in range(len(tokens)) if rows[row, 1] > 0), key=lambda row: -len(tokens[row].ids))
        was_training = self.model.training
        self.model.eval()
        try:
            while order:
                n = max(1, self.batch_tokens // len(tokens[order[0]].ids))
                rows[order[:n], 0] = self._nats([tokens[row] for row in order[:n]])
                order = order[n:]
        finally:
            self.model.train(was_training)
        return {self.name: Scores(rows, perplexity)}

    def _read(self, prompt: str, text: str, row: int) -> Tokens:
        opening, body = encode_prompt(self.tokenizer, prompt + text)
        before = encode_prompt(self.tokenizer, prompt)[1] if prompt else []
        shared = 0
        while shared < min(len(before), len(body)) and before[shared] == body[shared]:
            shared += 1
        if not text:
            shared = len(body)
        ids, start = opening + body, max(len(opening) + shared, 1)  # nothing says how probable a first token is
        excess = 0 if self.max_tokens is None else max(len(ids) - self.max_tokens, 0)
        if excess > start - 1 and excess > 0:
            raise ValueError(
                f"Expected texts that fit max_tokens={self.max_tokens} with a token before, got {len(ids) - start} "
                f"tokens in row {row}."
            )
        return Tokens(ids[excess:], start - excess)

    def _nats(self, rows: list[Tokens]) -> list[float]:
        """Return the negative log-likelihood of each row's text."""
        import torch  # only where it is needed: `textenv` runs without

        device = next(self.model.parameters()).device
        width = len(rows[0].ids)  # of the longest
        ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=device)  # (B, T)
        # Padding is on the right, where a causal model does not see it from the tokens that count.
        is_real = torch.tensor([[i < len(row.ids) for i in range(width)] for row in rows], device=device)
        is_text = torch.tensor([[row.start <= i < len(row.ids) for i in range(width)] for row in rows], device=device)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=is_real.long()).logits
            return _row_nats(logits[:, :-1], ids[:, 1:], is_text[:, 1:])


def _row_nats(logits: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> list[float]:
    """Return the summed negative log-likelihood of the targets that count, (B,), from logits (B, T, V)."""
    nats = logits.new_zeros(targets.shape).float()
    kept = logits[counts].float()  # (N, V): those of the prompts need no softmax
    nats[counts] = kept.logsumexp(dim=-1) - kept.gather(1, targets[counts][:, None])[:, 0]
    return nats.double().sum(dim=1).tolist()


class IntentAccuracy:
    """The share of texts in which a classifier reads the label of their row: `intent_accuracy`.

    The classifier sees the text alone, through its own tokenizer. It should not be the one that was the reward: that
    one the policy has learned to please. Needs prompts that carry their rows, as those of `agents.evaluate` do.

    Args:
        model: A text classifier: a name on the hub, a folder, or a model with its `tokenizer`.
        tokenizer: The model's own, where it is a model.
        label_column: Where each row's label is: the number of one of the model's labels, or its name.
        name: The figure's name.
        batch_size: The most texts a forward.

    Raises:
        ValueError: If a prompt has no such column, or its label is none of the model's.

    Example:
        >>> from textenv.metrics import IntentAccuracy
        >>> # evaluate(model, rows, tokenizer, [IntentAccuracy("my-intents")], references_column="references")
    """

    def __init__(
        self,
        model: ModelLike,
        tokenizer: Any = None,
        label_column: str = "intent",
        name: str = "intent_accuracy",
        batch_size: int = 32,
    ) -> None:
        from textenv.rewards.classifier import Classifier  # needs torch

        self.label_column, self.name = label_column, name
        options: dict[str, Any] = {"label_column": label_column, "output": "label", "batch_size": batch_size}
        self._classifier = Classifier(model, tokenizer=tokenizer, **options)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the share of texts of the right label."""
        return {self.name: mean_of(self._classifier.judge(texts, [self._label(prompt) for prompt in prompts]))}

    def _label(self, prompt: str) -> Any:
        if not isinstance(prompt, Prompt) or self.label_column not in prompt.row:
            raise ValueError(
                f"Expected prompts whose rows have the column {self.label_column!r}, as those that `evaluate` gives, "
                f"got {prompt!r:.80}."
            )
        return prompt.row[self.label_column]
