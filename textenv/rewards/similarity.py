"""The similarity of texts by sentence embeddings. The module needs torch, so `textenv.rewards` does not import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from textenv.checks.extras import check_extra, needs
from textenv.episodes.completion import Preds
from textenv.episodes.scores import ScoreAt
from textenv.huggingface.weights import refused_code
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, Reads, check_choice, read_references, read_text
from textenv.rewards.text_model import read_dtype

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass
class Similarity(BatchReward):
    """The cosine, in [-1, 1], of the embeddings of a text and its reference; the highest one of several references.

    The method is that of Sentence-BERT (Reimers and Gurevych, 2019, section 3). The model reads the text through its
    own tokenizer, never the policy's token ids, and truncates it to its `max_seq_length`. An empty text scores 0. A
    model given by name is loaded at the first score, and a pickle holds its name alone.

    The reward needs sentence-transformers: `pip install "textenv[similarity]"`.

    Args:
        model: A name on the hub, the path of a folder, or a `SentenceTransformer` in this process.
        text: A text with which all texts are compared, instead of each prompt's references.
        reads: "completion" compares the completion alone, "whole" the prompt and the completion as one text.
        batch_size: The most texts in a forward pass.
        device: The device of the model; None leaves it where it is (the CPU for a model loaded by name).
        dtype: The dtype of the weights, such as "bfloat16"; None for float32 where they are loaded by name, and for no
            change to a model in this process.
        score_at: "rollout_end" scores the texts of a rollout together, "done" each text when it ends.

    Raises:
        ImportError: If sentence-transformers is not installed.
        ValueError: If `text` is empty or a number is out of its range.

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
        """Return the state to pickle, without the loaded model, which is loaded again from `model`."""
        return {**vars(self), "_loaded": None}

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return the score of each row."""
        texts = [read_text(self.reads, *row) for row in zip(prompts, preds, strict=True)]
        references = [read_references(prompt) if self.text is None else [self.text] for prompt in prompts]
        # Each different text is embedded once: references are often shared by many rows.
        distinct = dict.fromkeys(text for row in [texts, *references] for text in row if text.strip())
        embeddings = dict(zip(distinct, self._embed(list(distinct)), strict=True)) if distinct else {}

        def cosine(text: str, reference: str) -> float:
            has_both = text in embeddings and reference in embeddings
            return float(embeddings[text] @ embeddings[reference]) if has_both else 0.0

        return [max(cosine(text, own) for own in row) for text, row in zip(texts, references, strict=True)]

    def _embed(self, texts: list[str]) -> torch.Tensor:
        """Return the embeddings of N texts, normalised to length 1, (N, H) float32 on the CPU."""
        if self._loaded is None:
            self._loaded = self._load()
        embeddings = self._loaded.encode(
            texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return torch.nn.functional.normalize(embeddings.float(), dim=1).cpu()

    def _load(self) -> SentenceTransformer:
        with needs("similarity", "sentence_transformers", "Similarity"):  # here, since it takes seconds to import
            from sentence_transformers import SentenceTransformer

        model, dtype = self.model, self.dtype
        if not isinstance(model, SentenceTransformer):
            try:
                model = SentenceTransformer(str(model), device="cpu")  # by default it would take a GPU if there is one
            except ValueError as error:
                raise refused_code(error, model) from error
            dtype = "float32" if dtype is None else dtype
        if dtype is not None:
            model.to(read_dtype(dtype))
        if self.device is not None:
            model.to(self.device)
        return model.eval()
