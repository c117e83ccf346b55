"""The frozen Hugging Face model behind rewards of texts: its loading, tokenizing and batching. It needs torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from textenv.huggingface.positions import n_positions
from textenv.huggingface.weights import check_name, from_pretrained, load_whole

ModelLike = str | PathLike[str] | PreTrainedModel


class TextModel:
    """A model for sequence classification with its own tokenizer: text in, logits out.

    The model is put into evaluation mode and computes no gradients. Texts are sorted by length into batches and padded
    on the right, whatever the tokenizer's `padding_side`, since models with absolute positions score a left-padded text
    differently. The score of a causal model is read at its last token that is not the config's pad token; a config
    without a pad token gets the tokenizer's pad token, or else its end token. An empty text is scored as a single pad
    token.

    Args:
        model: A name on the hub, the path of a folder, or a model in this process.
        tokenizer: The model's own tokenizer; None loads the tokenizer of the same name or path.
        max_length: The most tokens of a text, special tokens included; None for the limit of tokenizer and model.
            Longer texts are truncated, with one warning.
        truncation_side: The side on which longer texts lose tokens.
        batch_size: The most texts in a forward pass.
        device: The device of the model; None leaves it where it is.
        dtype: The dtype of the weights; None for float32 where they are loaded by name, and for no change to a model
            in this process. Scores are float32 in any case.
        auto_class: The class of transformers that loads a name or path.

    Raises:
        ValueError: If `max_length` or `batch_size` is out of its range, a model in this process comes without its
            tokenizer, there is neither pad nor end token, or weights are missing or damaged.
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
        # Called only on request, since transformers' `PreTrainedModel.to` refuses quantised models.
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
        # A tokenizer without a limit has 1e30 (transformers `tokenization_utils_base.VERY_LARGE_INTEGER`).
        limit = min(self.tokenizer.model_max_length, n_positions(self.model) or self.tokenizer.model_max_length)
        if max_length is not None and not 1 <= max_length <= limit:
            raise ValueError(
                f"Expected `max_length` in [1, {limit}], what tokenizer and model allow, got {max_length}."
            )
        return limit if max_length is None else max_length

    def _find_pad_id(self) -> int:
        # transformers `modeling_layers.GenericForSequenceClassification.forward` reads the score at the last token that
        # is not the pad token, and refuses batches if the config has no pad token.
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:
            tokenizer = self.tokenizer
            config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if config.pad_token_id is None:
            raise ValueError("Expected a tokenizer with a pad or an end token, got neither: set tokenizer.pad_token.")
        return config.pad_token_id

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text, truncated to `max_length`."""
        tokenize = self.tokenizer
        # The first pass does not truncate, which shows the texts that are too long.
        ids = tokenize(list(texts), add_special_tokens=add_special_tokens, truncation=False, verbose=False)["input_ids"]
        long = [row for row, tokens in enumerate(ids) if len(tokens) > self.max_length]
        for row in long:
            cut = {"truncation": True, "max_length": self.max_length, "add_special_tokens": add_special_tokens}
            ids[row] = tokenize(texts[row], **cut)["input_ids"]
        if long and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{len(long)} of {len(texts)} texts are longer than max_length={self.max_length} tokens of "
                f"{type(self.model).__name__}; they are cut on the {tokenize.truncation_side}. This is said once.",
                stacklevel=3,
            )
        return ids

    def logits(self, texts: Sequence[str], add_special_tokens: bool = True) -> np.ndarray:
        """Return the logits of B texts, (B, labels) float32."""
        ids = self.encode(texts, add_special_tokens)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        logits = np.zeros((len(ids), self.model.config.num_labels), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]  # texts of similar lengths need little padding
            logits[rows] = self._forward([ids[row] or [self.pad_id] for row in rows])
        return logits

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        tokens, is_text = self.pad(ids)
        return self.model(input_ids=tokens, attention_mask=is_text).logits.float().cpu().numpy()

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token ids, padded on the right, and their attention mask: two (B, T) int64 on the device."""
        tokens = torch.full((len(ids), max(map(len, ids))), self.pad_id)  # (B, T)
        is_text = torch.zeros_like(tokens)  # (B, T)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            is_text[row, : len(text)] = 1
        return tokens.to(self.model.device), is_text.to(self.model.device)


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name, such as "bfloat16", or the dtype itself.

    Raises:
        ValueError: If torch has no such dtype.
    """
    torch_dtype = vars(torch).get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"Expected `dtype` to be a dtype of torch, as 'bfloat16', got {dtype!r}.")
    return torch_dtype
