"""The order of prompts by epochs: shuffled, or as the source has them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from textenv.prompts.prompts import Order


class PromptCursor:
    """The order of prompts: each once an epoch, as a function of (seed, epoch).

    The state is (seed, epoch, position), so a run can be resumed anywhere.

    Args:
        n_prompts: How many prompts there are.
        order: "shuffle": a new permutation each epoch; "sequential": the order of the source.
        seed: The seed of the permutations.
        shard: (r, w) where w processes share the order: this one takes each w-th prompt of it, from the r-th on (r
            counts from 0).

    Attributes:
        epoch: How many epochs were finished before the last prompt.
        position: How many prompts of that epoch have been drawn, the last one included.

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
        # From (seed, epoch), not from a running generator: a resumed run draws the same without saving one.
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.n_prompts)

    def advance(self) -> int:
        """Return the number of the next prompt."""
        rank, size = self.shard
        # The first draw from `n_drawn` on that is this process's: those with rank = draw modulo size.
        epoch, index = divmod(self.n_drawn + (rank - self.n_drawn) % size, self.n_prompts)
        if epoch != self.epoch:
            self.epoch = epoch
            self._permutation = self._draw()
        self.position = index + 1
        return self.number

    @property
    def n_drawn(self) -> int:
        """How many prompts all processes together have drawn, up to this one's last."""
        return self.epoch * self.n_prompts + self.position

    @property
    def number(self) -> int:
        """The number that `advance` returned last."""
        return int(self._permutation[self.position - 1])

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch and position."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._permutation = self._draw()
