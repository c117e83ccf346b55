"""How near texts are in meaning, by sentence embeddings. Needs torch, and so stands apart from `textenv.rewards`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from textenv.completion import Preds
from textenv.extras import check_extra, needs
from textenv.model_loading import refused_code
from textenv.prompts import Prompt
from textenv.rewarding import ScoreAt
from textenv.rewards.base import BatchReward, Reads, check_choice, read_references, read_text
from textenv.rewards.text_model import read_dtype

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass
class Similarity(BatchReward):
    """The cosine, in [-1, 1], of the embeddings of the text and of what it is compared with; the best of several.

    (Reimers and Gurevych 2019, Sentence-BERT, section 3.) The model sees text and its own tokenizer's tokens, never the
    policy's ids. It is loaded when it is first asked, and where it was given by name a pickle has the name alone.
    Longer texts are cut at the model's `max_seq_length`. An empty text is like none: 0, whatever the model says.

    Needs sentence-transformers: `pip install "textenv[similarity]"`.

    Args:
        model: A name on the hub, the path of a folder, or a `SentenceTransformer` in this process.
        text: What all texts are compared with, instead of each prompt's references.
        reads: "completion" compares what the policy wrote, "whole" the prompt with it.
        batch_size: The most texts a forward.
        device: Where the model runs; unset, where it is (loaded: the CPU).
        dtype: Of the weights ("bfloat16"); unset, float32 where it is loaded, and unchanged where it is given.
        score_at: "rollout_end" scores a rollout's texts together, "done" each when it ends.

    Raises:
        ImportError: Without sentence-transformers.

    Example:
        >>> import numpy as np
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        >>> from agents import word_tokenizer
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> tokenizer = word_tokenizer(["good", "film"]).backend_tokenizer
        >>> model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=np.eye(4))], device="cpu")
        >>> letters, prompt = CharTokenizer(), Prompt("a", references=["good film"])
        >>> round(Similarity(model)(prompt, Preds(letters, letters.encode("film")), True), 4)  # sqrt(1 / 2)
        0.7071
    """

    model: str | PathLike[str] | SentenceTransformer = field(repr=False)
    text: str | None = None
    reads: Reads = "completion"
    batch_size: int = 32
    device: Any = None
    dtype: Any = None
    score_at: ScoreAt = "rollout_end"

    def __post_init__(self) -> None:
        check_choice("reads", self.reads, ("completion", "whole"))
        check_choice("score_at", self.score_at, ("done", "rollout_end"))
        if self.batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be at least 1, got {self.batch_size}.")
        if self.text is not None and not self.text.strip():
            raise ValueError(f"Expected `text` to have words, got {self.text!r}.")
        check_extra("similarity", "sentence_transformers", "Similarity")
        self._loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: a model that was loaded by name is loaded again."""
        return {**vars(self), "_loaded": None}

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return a number a row."""
        texts = [read_text(self.reads, prompt, one) for prompt, one in zip(prompts, preds, strict=True)]
        others = [read_references(prompt) if self.text is None else [self.text] for prompt in prompts]
        different = dict.fromkeys(text for row in [texts, *others] for text in row if text.strip())
        embeddings = dict(zip(different, self._embed(list(different)), strict=True)) if different else {}
        return [
            max(
                float(embeddings[text] @ embeddings[other]) if text in embeddings and other in embeddings else 0.0
                for other in row
            )
            for text, row in zip(texts, others, strict=True)
        ]

    def _embed(self, texts: list[str]) -> torch.Tensor:
        """Return the embeddings of texts, of length 1, (N, H) float32 on the CPU."""
        if self._loaded is None:
            self._loaded = self._load()
        embeddings = self._loaded.encode(
            texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return torch.nn.functional.normalize(embeddings.float(), dim=1).cpu()

    def _load(self) -> SentenceTransformer:
        with needs("similarity", "sentence_transformers", "Similarity"):  # slow to import
            from sentence_transformers import SentenceTransformer

        model, dtype = self.model, self.dtype
        if not isinstance(model, SentenceTransformer):
            try:
                model = SentenceTransformer(str(model), device="cpu")  # left to itself it would take a GPU
            except ValueError as error:
                raise refused_code(error, model) from error
            dtype = "float32" if dtype is None else dtype
        if dtype is not None:
            model.to(read_dtype(dtype))
        if self.device is not None:
            model.to(self.device)
        return model.eval()
