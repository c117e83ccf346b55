"""The texts of the next rollout, which an engine writes while the policy is updated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .process import pack, unpack
from .protocol import Completion, EngineLost


class NextTexts:
    """Texts that an engine has been asked for ahead, with the rows that they continue.

    Args:
        rows: The observation that each text continues, without padding: its lane is recognised by it.
        answer: A function that waits for the texts, checks and returns them; it is called once.
    """

    def __init__(self, rows: Sequence[np.ndarray], answer: Callable[[], list[Completion]]) -> None:
        self.rows = rows
        self._answer = answer
        self._texts: list[Completion] | None = None

    @property
    def are_here(self) -> bool:
        """Whether the texts have been waited for, so that the engine may end."""
        return self._texts is not None

    def texts(self) -> list[Completion]:
        """Return the texts, for which the first call waits."""
        if self._texts is None:
            self._texts = self._answer()
        return self._texts

    def settled(self) -> NextTexts | None:
        """Wait for the texts; with a warning, return None if the engine has ended before they were written."""
        try:
            self.texts()
        except EngineLost as error:
            warnings.warn(
                f"The texts of the next rollout, which an engine wrote ahead, are lost, and are written anew by newer "
                f"weights: the run goes on, but not as it would have. {error}",
                stacklevel=2,
            )
            return None
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the texts and their rows as tensors, for a checkpoint."""
        texts = self.texts()
        rows, row_lengths = pack(self.rows)
        tokens, lengths = pack([text.tokens for text in texts])
        log_probs = torch.as_tensor(np.concatenate([text.log_probs for text in texts]))
        return {
            "rows": rows,
            "row_lengths": row_lengths,
            "tokens": tokens,
            "lengths": lengths,
            "log_probs": log_probs,
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> NextTexts:
        """Return the texts of a checkpoint, from what `tensors` returned."""
        tokens = unpack(tensors["tokens"], tensors["lengths"])
        log_probs = unpack(tensors["log_probs"], tensors["lengths"])
        texts = cls(
            unpack(tensors["rows"], tensors["row_lengths"]),
            lambda: [Completion(*pair) for pair in zip(tokens, log_probs, strict=True)],
        )
        texts.texts()
        return texts
