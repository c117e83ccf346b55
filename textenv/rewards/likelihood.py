"""The likelihood of completions under a frozen model. The module needs torch: `textenv.rewards` does not import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from textenv.episodes.completion import Preds
from textenv.episodes.rules import EndReason
from textenv.episodes.scores import ScoreAt
from textenv.prompts.chat import Message
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, check_choice
from textenv.rewards.text_model import ModelLike, TextModel
from textenv.rewards.text_reader import Parts, ReadAs, messages_of, render_open


@dataclass
class Likelihood(BatchReward):
    """The mean log-probability, in nats per token, of the completion given the prompt, under a frozen causal model.

    The model's own tokenizer reads prompt and completion as one text (`TextReader`), or, if the prompt is a chat and
    the tokenizer has a chat template, as one conversation, up to the end of its last answer. A token counts if it ends
    after the prompt, or within an answer of the conversation. The model's end token counts where the policy ended the
    text, and for an empty completion, so that writing nothing is not free; no other token closes the text. The first
    token of the text has no probability and is left out.

    Args:
        model: A name on the hub, the path of a folder, or a model in this process (with `tokenizer`).
        tokenizer: The model's own tokenizer, a fast one, for a model in this process.
        max_length: The most tokens of prompt and completion together; longer texts lose their start, but not the tokens
            that open them (BOS), without a warning.
        batch_size: The most texts in a forward pass.
        device: The device of the model; None leaves it where it is (the CPU for a model loaded by name).
        dtype: The dtype of the weights, such as "bfloat16"; None for float32 where they are loaded by name, and for no
            change to a model in this process.
        score_at: "rollout_end" scores the texts of a rollout together, "done" each text when it ends.

    Raises:
        ValueError: If the tokenizer is not a fast one or has no end token.

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
            truncation_side="left",
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
        """Return the score of each row."""
        texts = [self._encode(*row) for row in zip(prompts, preds, strict=True)]
        order = sorted(range(len(texts)), key=lambda row: len(texts[row][0]))  # similar lengths need little padding
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, score in zip(rows, self._forward([texts[row] for row in rows]), strict=True):
                scores[row] = score
        return scores

    def _encode(self, prompt: Prompt, preds: Preds) -> tuple[list[int], list[bool]]:
        """Return the ids of prompt and completion, and for each id whether it counts."""
        tokenizer, whole = self._model.tokenizer, self._model.reader.whole(prompt, preds)
        # Nothing closes the text but the end token below.
        reader = replace(self._model.reader, read_as=ReadAs(is_chat=not isinstance(whole, str)))
        opening, body, _ = reader.parts(whole)
        text = reader.text(whole)
        # The offsets of a token are the characters where it starts and ends; only fast tokenizers have them.
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
        ends = [end for _, end in coded["offset_mapping"]]
        ends = [0] * (len(opening) + len(body) - len(ends)) + ends  # tokens in front of the text end at 0
        if isinstance(whole, str):
            answers = [(len(prompt), len(text))]
        else:
            answers = answers_of(tokenizer, messages_of(prompt), whole, text)
        counts = [any(start < end <= last for start, last in answers) for end in ends]
        is_ended = preds.end_reason is EndReason.EOS or not any(counts[1:])
        eos = [tokenizer.eos_token_id] if is_ended else []
        ids = reader.cut(Parts(opening, body, eos))
        counts = counts[len(opening) :] + [True] * len(eos)
        n_kept = len(ids) - len(opening)
        return ids, [False] * len(opening) + counts[len(counts) - n_kept :]

    @torch.inference_mode()
    def _forward(self, texts: Sequence[tuple[list[int], list[bool]]]) -> list[float]:
        tokens, is_text = self._model.pad([ids for ids, _ in texts])  # (B, T)
        counts = torch.zeros_like(tokens)  # (B, T)
        for row, (_, text_counts) in enumerate(texts):
            counts[row, : len(text_counts)] = torch.tensor(text_counts).long()
        counts = counts[:, 1:]  # (B, T - 1): the logits at a token are those of the next
        logits = self._model.model(input_ids=tokens, attention_mask=is_text).logits[:, :-1].float()  # (B, T - 1, V)
        log_probs = logits.gather(2, tokens[:, 1:, None])[..., 0] - logits.logsumexp(2)  # (B, T - 1)
        return ((log_probs * counts).sum(1) / counts.sum(1).clamp(min=1)).tolist()  # (B,)


def answers_of(
    tokenizer: Any, messages: Sequence[Message], whole: Sequence[Message], text: str
) -> list[tuple[int, int]]:
    """Return the characters of the text at which each new answer of a conversation starts and ends.

    Args:
        tokenizer: The tokenizer.
        messages: The messages of the prompt.
        whole: The messages of the conversation: the prompt's, of which the last may have been continued, and more.
        text: The text of the conversation, up to the end of its last answer.

    Raises:
        ValueError: If the template changes earlier messages when one is added.
    """
    answers = []
    first = len(messages) - 1 if messages[-1]["role"] == "assistant" else len(messages)
    for index in range(first, len(whole)):
        if whole[index]["role"] != "assistant":
            continue
        before = render_open(tokenizer, messages if index == first else whole[:index])
        after = render_open(tokenizer, whole[: index + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                "Expected a chat template that keeps earlier messages as they are when one is added, got one that "
                f"writes {before[-80:]!r} in another way: give prompts as texts in the model's format."
            )
        answers.append((len(before), len(after)))
    return answers
