"""How likely a frozen language model finds the completion. Needs torch, and so stands apart from `textenv.rewards`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from textenv.completion import Preds
from textenv.episode import EndReason
from textenv.prompts import Prompt
from textenv.rewarding import ScoreAt
from textenv.rewards.base import BatchReward, check_choice
from textenv.rewards.text_model import ModelLike, TextModel


@dataclass
class Likelihood(BatchReward):
    """The mean log-probability, in nats a token, of the completion given the prompt, under a frozen causal model.

    The tokens are the model's own, of prompt and completion read as one text: those that end behind the prompt count,
    and so does the model's end token where the policy ended the text (or where there is nothing else: an empty text is
    not free). A token with nothing in front of it has no probability and is left out.

    Args:
        model: A name on the hub, the path of a folder, or a model in this process (with `tokenizer`).
        tokenizer: The model's own, where the model is no name or path; a fast one.
        max_length: The most tokens of prompt and completion; longer texts lose their start, which is not said.
        batch_size: The most texts a forward.
        device: Where the model runs; unset, where it is (loaded: the CPU).
        dtype: Of the weights ("bfloat16"); unset, float32 where it is loaded, and unchanged where it is given.
        score_at: "rollout_end" scores a rollout's texts together, "done" each when it ends.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from agents import word_tokenizer
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1))
        >>> reward = Likelihood(model, tokenizer=word_tokenizer(["good", "film"]))
        >>> reward(Prompt("good "), Preds(CharTokenizer(), CharTokenizer().encode("film")), True) < 0
        True
    """

    model: ModelLike = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    max_length: int | None = None
    batch_size: int = 32
    device: Any = None
    dtype: Any = None
    score_at: ScoreAt = "rollout_end"

    def __post_init__(self) -> None:
        check_choice("score_at", self.score_at, ("done", "rollout_end"))
        self._model = TextModel(
            self.model,
            self.tokenizer,
            max_length=self.max_length,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            auto_class=AutoModelForCausalLM,
        )
        if not self._model.tokenizer.is_fast or self._model.tokenizer.eos_token_id is None:
            raise ValueError(
                f"Expected a fast tokenizer with an end token, got {type(self._model.tokenizer).__name__}."
            )

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return a number a row."""
        texts = [self._encode(prompt, one) for prompt, one in zip(prompts, preds, strict=True)]
        order = sorted(range(len(texts)), key=lambda row: len(texts[row][0]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, score in zip(rows, self._forward([texts[row] for row in rows]), strict=True):
                scores[row] = score
        return scores

    def _encode(self, prompt: Prompt, preds: Preds) -> tuple[list[int], list[bool]]:
        """Return the ids of prompt and completion, and which of them are judged."""
        tokenizer = self._model.tokenizer
        coded = tokenizer(str(prompt) + preds.text, return_offsets_mapping=True, truncation=False, verbose=False)
        places = list(zip(coded["input_ids"], coded["offset_mapping"], strict=True))
        while places and places[-1][0] == tokenizer.eos_token_id:  # some tokenizers end each text
            places.pop()
        ids, is_judged = [token for token, _ in places], [end > len(prompt) for _, (_, end) in places]
        if preds.end_reason is EndReason.EOS or not any(is_judged[1:]):
            ids, is_judged = [*ids, tokenizer.eos_token_id], [*is_judged, True]
        return ids[-self._model.max_length :], is_judged[-self._model.max_length :]

    @torch.inference_mode()
    def _forward(self, texts: Sequence[tuple[list[int], list[bool]]]) -> list[float]:
        tokens, is_text = self._model.pad([ids for ids, _ in texts])  # (B, T)
        is_judged = torch.zeros_like(tokens)  # (B, T)
        for row, (_, judged) in enumerate(texts):
            is_judged[row, : len(judged)] = torch.tensor(judged).long()
        is_judged = is_judged[:, 1:]
        logits = self._model.model(input_ids=tokens, attention_mask=is_text).logits[:, :-1].float()
        log_probs = logits.gather(2, tokens[:, 1:, None])[..., 0] - logits.logsumexp(2)  # (B, T - 1)
        return ((log_probs * is_judged).sum(1) / is_judged.sum(1).clamp(min=1)).tolist()
