"""Metrics by a separate model: the perplexity of the texts, and the accuracy of their intents by a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from textenv.huggingface.positions import n_positions
from textenv.metrics.scores import Scores, mean_of
from textenv.prompts.prompts import Prompt
from textenv.text.tokenizer import Tokenizer, encode_prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from textenv.rewards.text_model import ModelLike


class Tokens(NamedTuple):
    """The tokens of a row, and the position of the text's first token."""

    ids: list[int]
    start: int


def perplexity(sums: np.ndarray) -> float:
    """Return exp(nats / tokens) from these two sums; nan without tokens."""
    return float(np.exp(sums[0] / sums[1])) if sums[1] else math.nan


class Perplexity:
    """The perplexity of the texts, given their prompts, under a causal language model.

    That is exp of the mean negative log-likelihood, in nats, over all tokens of all texts. The model reads prompt and
    text through its own tokenizer, which may differ from the policy's. Tokens of the prompt and end tokens are not
    counted; a token that spans the end of the prompt and the start of the text is counted. With an empty prompt, the
    first token of the text counts only if the tokenizer puts a token before it.

    A row that is too long loses the start of its prompt. Figures under different models or tokenizers cannot be
    compared.

    Args:
        model: A causal model of transformers, on any device; it runs in evaluation mode, without gradients.
        tokenizer: The model's own tokenizer.
        name: The name of the figure.
        max_tokens: The most tokens of a row; None for the longest sequence that the model's positions allow.
        batch_tokens: The most tokens in a forward pass, padding included.

    Raises:
        ValueError: If a text alone is longer than `max_tokens`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from textenv import CharTokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=3, n_embd=8, n_layer=1, n_head=1))
        >>> metric = Perplexity(model, CharTokenizer("ab"))
        >>> metric(["a"], ["bab"], [[]])["perplexity"].value > 1
        True
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
        self.max_tokens = n_positions(model) if max_tokens is None else max_tokens
        self.batch_tokens = batch_tokens

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the perplexity of all texts together."""
        tokens = [self._read(prompt, text, row) for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]
        rows = np.array([[0.0, max(len(row.ids) - row.start, 0)] for row in tokens])  # (N, 2): nats, tokens
        order = sorted((row for row in range(len(tokens)) if rows[row, 1] > 0), key=lambda row: -len(tokens[row].ids))
        was_training = self.model.training
        self.model.eval()
        try:
            while order:
                n = max(1, self.batch_tokens // len(tokens[order[0]].ids))  # the first row of a batch is the longest
                rows[order[:n], 0] = self._nats([tokens[row] for row in order[:n]])
                order = order[n:]
        finally:
            self.model.train(was_training)
        return {self.name: Scores(rows, perplexity)}

    def _read(self, prompt: str, text: str, row: int) -> Tokens:
        opening, body = encode_prompt(self.tokenizer, prompt + text)
        before = encode_prompt(self.tokenizer, prompt)[1] if prompt else []
        shared = 0  # the text begins where the tokens of prompt and text differ from those of the prompt alone
        while shared < min(len(before), len(body)) and before[shared] == body[shared]:
            shared += 1
        if not text:
            shared = len(body)
        ids, start = opening + body, max(len(opening) + shared, 1)  # the model has no probability for a first token
        excess = 0 if self.max_tokens is None else max(len(ids) - self.max_tokens, 0)
        if excess > start - 1 and excess > 0:
            raise ValueError(
                f"Expected texts that fit max_tokens={self.max_tokens} with a token before, got {len(ids) - start} "
                f"tokens in row {row}."
            )
        return Tokens(ids[excess:], start - excess)

    def _nats(self, rows: list[Tokens]) -> list[float]:
        """Return the negative log-likelihood of each row's text, in nats."""
        import torch  # here, since the other metrics run without it

        device = next(self.model.parameters()).device
        width = len(rows[0].ids)  # T: the first row is the longest
        ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=device)  # (B, T)
        # Padding on the right does not change a causal model's logits at the tokens before it. (B, T) each:
        is_real = torch.tensor([[i < len(row.ids) for i in range(width)] for row in rows], device=device)
        is_text = torch.tensor([[row.start <= i < len(row.ids) for i in range(width)] for row in rows], device=device)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=is_real.long()).logits  # (B, T, V)
            return _row_nats(logits[:, :-1], ids[:, 1:], is_text[:, 1:])


def _row_nats(logits: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> list[float]:
    """Return the sum of the nats of the targets that count, (B,), from logits (B, T, V)."""
    nats = logits.new_zeros(targets.shape).float()  # (B, T)
    kept = logits[counts].float()  # (N, V): the tokens of the prompts need no softmax
    nats[counts] = kept.logsumexp(dim=-1) - kept.gather(1, targets[counts][:, None])[:, 0]  # (N,)
    return nats.double().sum(dim=1).tolist()


class IntentAccuracy:
    """The share of texts to which a classifier gives the label of their row: `intent_accuracy`.

    The classifier reads the text alone, through its own tokenizer. Use another classifier than the reward's, which the
    policy may have learned to exploit. The prompts must be `Prompt`s with their rows, such as `agents.evaluate` passes.

    Args:
        model: A text classifier: a name on the hub, the path of a folder, or a model in this process.
        tokenizer: The model's own tokenizer, for a model in this process.
        label_column: The column of the row with its label: the number or the name of one of the model's labels.
        name: The name of the figure.
        batch_size: The most texts in a forward pass.

    Raises:
        ValueError: If a prompt has no such column, or its label is none of the model's.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from agents import word_tokenizer
        >>> shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=4)
        >>> model = BertForSequenceClassification(BertConfig(**shape, id2label={0: "inform", 1: "question"}))
        >>> metric = IntentAccuracy(model, word_tokenizer(["who", "me"]))
        >>> metric([Prompt("hi", row={"intent": "question"})], ["who"], [[]])["intent_accuracy"].value in (0.0, 1.0)
        True
    """

    def __init__(
        self,
        model: ModelLike,
        tokenizer: Any = None,
        label_column: str = "intent",
        name: str = "intent_accuracy",
        batch_size: int = 32,
    ) -> None:
        from textenv.rewards.classifier import Classifier  # here, since the other metrics run without torch

        self.label_column, self.name = label_column, name
        options: dict[str, Any] = {"label_column": label_column, "output": "label", "batch_size": batch_size}
        self._classifier = Classifier(model, tokenizer=tokenizer, **options)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        """Return the share of texts with the right label."""
        return {self.name: mean_of(self._classifier.judge(texts, [self._label(prompt) for prompt in prompts]))}

    def _label(self, prompt: str) -> Any:
        if not isinstance(prompt, Prompt) or self.label_column not in prompt.row:
            raise ValueError(
                f"Expected prompts whose rows have the column {self.label_column!r}, as those that `evaluate` gives, "
                f"got {prompt!r:.80}."
            )
        return prompt.row[self.label_column]
