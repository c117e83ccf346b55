"""A game's own copy of the generators that libraries seed and draw from globally."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.random.mtrand import get_bit_generator, set_bit_generator


class OwnRandomness:
    """The state that `random` and NumPy's global functions have for one game, whatever it does to them.

    Within `inside` they go on from where this game left them; afterwards they stand where they stood before, so neither
    other games nor training notice. (Of NumPy's the whole bit generator changes places, which is 200 times faster than
    copying its state; a second normal deviate that its legacy functions hold ready is lost on the way.)

    Args:
        seed: What they are seeded with.

    Example:
        >>> own = OwnRandomness(0)
        >>> with own.inside():
        ...     first = random.random()
        >>> again = OwnRandomness(0)
        >>> with again.inside():
        ...     random.random() == first
        True
    """

    def __init__(self, seed: int) -> None:
        self._python: Any = random.Random(seed).getstate()
        self._numpy: Any = np.random.MT19937(seed)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have the global generators in this game's state, and put them back."""
        outside = random.getstate(), get_bit_generator()
        random.setstate(self._python)
        set_bit_generator(self._numpy)
        try:
            yield
        finally:
            self._python, self._numpy = random.getstate(), get_bit_generator()
            random.setstate(outside[0])
            set_bit_generator(outside[1])
