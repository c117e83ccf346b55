"""What stands around any use of transformers' `Trainer`: the extra that it needs, and random states left alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def accelerate_expected() -> Iterator[None]:
    """Name the extra where the imports within fail for want of accelerate."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            "Expected accelerate for transformers' Trainer, which is not installed: pip install textenv[sft]."
        ) from error


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give the process's random generators back as they were: the `Trainer` seeds them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
