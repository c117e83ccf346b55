"""A frozen Hugging Face model that gives each text numbers: loading, tokenizing, batches. Needs torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from textenv.model_loading import check_name, from_pretrained, load_whole, n_positions

ModelLike = str | PathLike[str] | PreTrainedModel


class TextModel:
    """Text in, logits out: a model for sequence classification with a tokenizer of its own.

    The model is put in evaluation mode and builds no graph. Texts are sorted by length for batches, and padded on the
    right whatever the tokenizer's `padding_side`: models of absolute positions score a left-padded text differently. A
    causal model's score is read where transformers reads it, at the last token that is not the pad token of the
    model's config. Where that is unset, it is set to the tokenizer's pad, or else end, token. An empty text is scored
    as a pad token alone.

    Args:
        model: A name on the hub, the path of a folder, or a model in this process.
        tokenizer: The model's own tokenizer; where the model is a name or path, it is found beside it.
        max_length: The most tokens of a text, special ones included. Unset, what tokenizer and model allow. Longer
            texts are cut, which is warned of once.
        truncation_side: Where longer texts lose tokens.
        batch_size: The most texts a forward.
        device: Where the model runs; unset, where it is.
        dtype: Of the weights; unset, float32 for what is loaded, and what it is for a model in this process. Scores
            are float32.
        auto_class: What loads a name or path.
    """

    def __init__(
        self,
        model: ModelLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_length: int | None = None,
        truncation_side: Literal["left", "right"] = "right",
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        auto_class: Any = AutoModelForSequenceClassification,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be at least 1, got {batch_size}.")
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("Expected the model's own `tokenizer` beside a model in this process, got none.")
            self.model: Any = model
        else:
            check_name(model)
            tokenizer = from_pretrained(AutoTokenizer, model) if tokenizer is None else tokenizer
            weights = read_dtype("float32" if dtype is None else dtype)
            self.model = load_whole(auto_class, model, any_more=True, dtype=weights)
        # A model that transformers has placed itself (quantised, on several devices) is left alone unless asked.
        if dtype is not None:
            self.model.to(dtype=read_dtype(dtype))
        if device is not None:
            self.model.to(device)
        self.model.eval()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = truncation_side
        self.batch_size = batch_size
        self.max_length = self._longest(max_length)
        self.pad_id = self._find_pad_id()
        self._has_warned = False

    def _longest(self, max_length: int | None) -> int:
        # A tokenizer without a limit of its own has 1e30 (transformers `tokenization_utils_base.VERY_LARGE_INTEGER`).
        limit = min(self.tokenizer.model_max_length, n_positions(self.model.config) or self.tokenizer.model_max_length)
        if max_length is not None and not 1 <= max_length <= limit:
            raise ValueError(
                f"Expected `max_length` in [1, {limit}], what tokenizer and model allow, got {max_length}."
            )
        return limit if max_length is None else max_length

    def _find_pad_id(self) -> int:
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:
            tokenizer = self.tokenizer
            config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if config.pad_token_id is None:
            raise ValueError("Expected a tokenizer with a pad or an end token, got neither: set tokenizer.pad_token.")
        return config.pad_token_id

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of texts, cut to `max_length`."""
        tokenize = self.tokenizer
        ids = tokenize(list(texts), add_special_tokens=add_special_tokens, truncation=False, verbose=False)["input_ids"]
        long = [row for row, tokens in enumerate(ids) if len(tokens) > self.max_length]
        for row in long:
            cut = {"truncation": True, "max_length": self.max_length, "add_special_tokens": add_special_tokens}
            ids[row] = tokenize(texts[row], **cut)["input_ids"]
        if long and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{len(long)} of {len(texts)} texts are longer than max_length={self.max_length} tokens of "
                f"{type(self.model).__name__}; they are cut on the {tokenize.truncation_side}. Not said again.",
                stacklevel=3,
            )
        return ids

    def logits(self, texts: Sequence[str], add_special_tokens: bool = True) -> np.ndarray:
        """Return the logits of texts, (B, labels) float32."""
        ids = self.encode(texts, add_special_tokens)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        logits = np.zeros((len(ids), self.model.config.num_labels), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            logits[rows] = self._forward([ids[row] or [self.pad_id] for row in rows])
        return logits

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        tokens, is_text = self.pad(ids)
        return self.model(input_ids=tokens, attention_mask=is_text).logits.float().cpu().numpy()

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return texts as tokens padded on the right, and 1 where a token is a text's, (B, T) int64 on the device."""
        tokens = torch.full((len(ids), max(map(len, ids))), self.pad_id)  # (B, T)
        is_text = torch.zeros_like(tokens)  # (B, T)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one)
            is_text[row, : len(one)] = 1
        return tokens.to(self.model.device), is_text.to(self.model.device)


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name, as "bfloat16", or the dtype that was given."""
    found = vars(torch).get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"Expected `dtype` to be a dtype of torch, as 'bfloat16', got {dtype!r}.")
    return found
