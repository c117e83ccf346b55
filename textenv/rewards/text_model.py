"""The frozen Hugging Face model behind rewards of texts: its loading, tokenizing and batching. It needs torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from textenv.huggingface.weights import check_name, from_pretrained, load_whole
from textenv.rewards.text_reader import Parts, ReadAs, Scored, TextReader, longest

ModelLike = str | PathLike[str] | PreTrainedModel


class TextModel:
    """A model for sequence or token classification with its own tokenizer: text in, logits at its last token out.

    The model is put into evaluation mode and computes no gradients. Texts are sorted by length into batches and padded
    on the right, whatever the tokenizer's `padding_side`, since models with absolute positions score a left-padded text
    differently. `TextReader` says which tokens a text or a conversation has. The score of a causal model is read at the
    last of them, also where that is the pad token, as in models whose pad token is the end token. A config without a
    pad token gets the tokenizer's pad token, or else its end token. An empty text is scored as a single pad token.

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
        self.batch_size = batch_size
        self.max_length = self._longest(max_length)
        # The reader cuts texts; at a longer one, the tokenizer would log that the model cannot read it.
        self.tokenizer.model_max_length = VERY_LARGE_INTEGER
        self.reader = TextReader(self.tokenizer, self.max_length, truncation_side, ReadAs.of(self.model.config))
        self.pad_id = self._find_pad_id()
        self._has_warned = False

    def _longest(self, max_length: int | None) -> int:
        limit = longest(self.model, self.tokenizer)
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

    def encode(self, texts: Sequence[Scored]) -> list[list[int]]:
        """Return the token ids of each text or conversation, cut to `max_length`."""
        return self.cut([self.reader.parts(text) for text in texts])

    def cut(self, parts: Sequence[Parts]) -> list[list[int]]:
        """Return the token ids of each encoded text, cut to `max_length`, with one warning of the first cut."""
        n_long = sum(1 for own in parts if len(own.body) > self.reader.room(own))
        if n_long and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{n_long} of {len(parts)} texts are longer than max_length={self.max_length} tokens of "
                f"{type(self.model).__name__}; they are cut on the {self.reader.truncation_side}. This is said once.",
                stacklevel=4,
            )
        return [self.reader.cut(own) for own in parts]

    def logits(self, texts: Sequence[Scored]) -> np.ndarray:
        """Return the logits of B texts or conversations, (B, labels) float32."""
        return self.logits_of(self.encode(texts))

    def logits_of(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the logits of B texts, given as token ids, (B, labels) float32."""
        ids = [own or [self.pad_id] for own in texts]
        logits = np.zeros((len(ids), self.model.config.num_labels), dtype=np.float32)
        for ends_with_pad in (False, True):
            order = [row for row, own in enumerate(ids) if (own[-1] == self.pad_id) == ends_with_pad]
            order.sort(key=lambda row: len(ids[row]))  # texts of similar lengths need little padding
            pad_id = int(self.pad_id == 0) if ends_with_pad else self.pad_id  # a token with which no text ends
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                with self.padded_with(pad_id):
                    logits[rows] = self._forward([ids[row] for row in rows])
        return logits

    @contextmanager
    def padded_with(self, pad_id: int) -> Iterator[None]:
        """Have the model take another pad token in a block.

        transformers `modeling_layers.GenericForSequenceClassification.forward` reads the score at the last token that
        is not the config's pad token: a text that ends with that token would be scored at an earlier one.
        """
        config = self.model.config.get_text_config()
        config.pad_token_id = pad_id
        try:
            yield
        finally:
            config.pad_token_id = self.pad_id

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        tokens, is_text = self.pad(ids)
        logits = self.model(input_ids=tokens, attention_mask=is_text).logits.float()
        if logits.ndim == 3:  # (B, T, labels), of a model for token classification
            logits = logits[torch.arange(len(ids), device=logits.device), is_text.sum(dim=1) - 1]  # (B, labels)
        return logits.cpu().numpy()

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token ids, padded on the right, and their attention mask: two (B, T) int64 on the device."""
        pad_id = self.model.config.get_text_config().pad_token_id
        tokens = torch.full((len(ids), max(map(len, ids))), pad_id)  # (B, T)
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
