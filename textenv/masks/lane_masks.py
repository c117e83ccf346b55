"""The masks of all lanes, combined into the tokens that each lane may write next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from textenv.episodes.completion import Preds
from textenv.episodes.scores import describe
from textenv.masks.token_masks import MaskError, TokenMask
from textenv.prompts.prompts import Prompt
from textenv.text.vocabulary import Vocabulary


class LaneMasks:
    """The masks of B lanes: a lane may write the tokens that all its masks allow.

    Args:
        masks: The masks.
        vocabulary: The tokens.
        n_lanes: The number of lanes, B.
    """

    def __init__(self, masks: Sequence[TokenMask], vocabulary: Vocabulary, n_lanes: int) -> None:
        self.masks = tuple(masks)
        self.vocabulary = vocabulary
        self.lanes = [[mask.start(vocabulary) for mask in masks] for _ in range(n_lanes)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the masks without their lanes' functions, which are made anew: llguidance's matchers do not pickle."""
        return LaneMasks, (self.masks, self.vocabulary, len(self.lanes))

    def allowed(self, rows: Sequence[tuple[Prompt, Preds] | None]) -> np.ndarray:
        """Return which tokens each lane may write next, (B, V) bool, a new array.

        Args:
            rows: Prompt and completion of each lane; None for a lane that may write any token.

        Raises:
            MaskError: If no token is allowed in a lane.
        """
        packed = np.stack(  # (B, W)
            [self.vocabulary.everything if row is None else self._packed(lane, *row) for lane, row in enumerate(rows)]
        )
        # `view` instead of `astype`: the bytes are 0 or 1, and a second array of B * V bytes is saved
        return np.unpackbits(packed, axis=1, count=self.vocabulary.size, bitorder="little").view(bool)  # (B, V)

    def _packed(self, lane: int, prompt: Prompt, preds: Preds) -> np.ndarray:
        by_mask = [allowed(prompt, preds) for allowed in self.lanes[lane]]  # (W,) each
        bits = np.bitwise_and.reduce([self.vocabulary.everything, *by_mask])
        if bits.any():
            return bits
        empty = [mask for mask, allowed in zip(self.masks, by_mask, strict=True) if not allowed.any()]
        raise MaskError(
            f"Expected a token to be allowed, got none from {empty or list(self.masks)} ({describe(prompt, preds)}). "
            "Either the mask forbids the text so far, or no token can continue it, or the text is complete and a "
            "stop id is missing (`stop_ids`)."
        )
