"""Process reward models as rewards of single steps. The module needs torch, so `textenv.rewards` does not import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from textenv.huggingface.weights import check_name, from_pretrained
from textenv.prompts.prompts import Prompt
from textenv.rewards.steps import StepwiseReward
from textenv.rewards.text_model import ModelLike, TextModel
from textenv.rewards.text_reader import Parts


@dataclass
class ProcessReward(StepwiseReward):
    """The score of each step by a process reward model, on the token that ends the step.

    The model is one that TRL's `PRMTrainer` writes, `AutoModelForTokenClassification` with two labels, or one for
    sequence classification. It reads the prompt and the steps so far as they were read there: BOS if the tokenizer has
    one, the prompt, and each step with the separator behind it, the last one included, all encoded apart and without
    other special tokens. The score is read at the last token: the probability that the step is right (label 1), or the
    logit of a model with one label. Each step is read once, when it ends, together with those of other lanes that end
    at the same time; the model reads the text before it again.

    Args:
        model: A name on the hub, the path of a folder, or a model in this process (with `tokenizer`).
        separator: The text between two steps, in the policy's texts and for the model: `step_separator` of its
            training.
        tokenizer: The model's own tokenizer, for a model in this process.
        max_length: The most tokens of a text; longer texts lose tokens on the left, with one warning.
        batch_size: The most texts in a forward pass.
        device: The device of the model; None leaves it where it is (the CPU for a model loaded by name).
        dtype: The dtype of the weights, such as "bfloat16"; None for float32 where they are loaded by name, and for no
            change to a model in this process.
        score_at: "step", since steps end within a text.

    Raises:
        ValueError: If the model has more than two labels, or the separator is empty.

    Example:
        >>> from transformers import GPT2Config, GPT2ForTokenClassification
        >>> from agents import word_tokenizer
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> model = GPT2ForTokenClassification(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1, num_labels=2))
        >>> reward = ProcessReward(model, tokenizer=word_tokenizer(["so", "then", ","]), separator=",")
        >>> steps = Preds(CharTokenizer(), CharTokenizer().encode("then, so"))  # two, each with a probability
        >>> 0 < reward(Prompt("so "), steps, True) < 2
        True
    """

    model: ModelLike = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    max_length: int | None = None
    batch_size: int = 32
    device: Any = None
    dtype: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._model = TextModel(
            self.model,
            self.tokenizer,
            max_length=self.max_length,
            truncation_side="left",
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            auto_class=_auto_class(self.model),
        )
        self._n_labels = self._model.model.config.num_labels
        if self._n_labels > 2:
            raise ValueError(
                f"Expected a process reward model with one label, or with two (wrong, right), got {self._n_labels}."
            )

    def score_steps(self, prompts: Sequence[Prompt], steps: Sequence[Sequence[str]]) -> list[float]:
        """Return the model's score of the last step of each row."""
        texts = [self._parts(prompt, own) for prompt, own in zip(prompts, steps, strict=True)]
        logits = torch.from_numpy(self._model.logits_of(self._model.cut(texts))).double()  # (B, labels)
        scores = logits[:, 0] if self._n_labels == 1 else logits.softmax(dim=1)[:, 1]
        return scores.tolist()

    def _parts(self, prompt: Prompt, steps: Sequence[str]) -> Parts:
        """Return the tokens of a prompt and its steps, as TRL `PRMTrainer.tokenize_row` encodes them."""
        tokenizer = self._model.tokenizer
        pieces = [str(prompt), *(piece for step in steps for piece in (step, self.separator))]
        body = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        return Parts([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], body, [])


def _auto_class(model: ModelLike) -> Any:
    """Return the class of transformers that loads a name or path; a model in this process is not loaded."""
    if isinstance(model, PreTrainedModel):
        return AutoModelForTokenClassification
    check_name(model)
    architectures = from_pretrained(AutoConfig, model).architectures or []
    is_by_token = any(name.endswith("ForTokenClassification") for name in architectures)
    return AutoModelForTokenClassification if is_by_token else AutoModelForSequenceClassification
