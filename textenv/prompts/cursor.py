"""The order of prompts by epochs: shuffled, or that of the source."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from textenv.prompts.prompts import Order


class PromptCursor:
    """The order of prompts: each prompt once an epoch, in an order that depends on (seed, epoch) only.

    The state is (seed, epoch, position), so a run can be resumed anywhere.

    Args:
        n_prompts: The number of prompts.
        order: "shuffle": a new permutation each epoch; "sequential": the order of the source.
        seed: The seed of the permutations.
        shard: (r, w) where w processes share the order: this process takes every w-th prompt, starting with prompt r
            of the order (r counts from 0).

    Attributes:
        epoch: The epoch of the last prompt, from 0.
        position: The number of prompts of that epoch that have been drawn, the last one included.

    Example:
        >>> cursor = PromptCursor(3, "shuffle", seed=0)
        >>> sorted(cursor.advance() for _ in range(3))
        [0, 1, 2]
    """

    def __init__(self, n_prompts: int, order: Order, seed: int, shard: tuple[int, int] = (0, 1)) -> None:
        self.n_prompts = n_prompts
        self.order = order
        self.seed = seed
        self.shard = shard
        self.epoch = 0
        self.position = 0
        self._permutation = self._draw()

    def _draw(self) -> np.ndarray:
        if self.order == "sequential":
            return np.arange(self.n_prompts)
        # A fresh generator from (seed, epoch), so that a resumed run draws the same order without a saved generator.
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.n_prompts)

    def advance(self) -> int:
        """Return the number of the next prompt."""
        rank, size = self.shard
        # Draw number d belongs to the process whose rank is d modulo size; this is the first one from `n_drawn` on.
        epoch, index = divmod(self.n_drawn + (rank - self.n_drawn) % size, self.n_prompts)
        if epoch != self.epoch:
            self.epoch = epoch
            self._permutation = self._draw()
        self.position = index + 1
        return self.number

    @property
    def n_drawn(self) -> int:
        """The number of prompts that all processes together have drawn, up to the last one of this process."""
        return self.epoch * self.n_prompts + self.position

    @property
    def number(self) -> int:
        """The number that `advance` returned last."""
        return int(self._permutation[self.position - 1])

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch and position."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._permutation = self._draw()
