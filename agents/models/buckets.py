"""Buckets of sequences of similar length, so that forwards read little padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MIN_BUCKET_TOKENS = 512  # for fewer tokens, a forward of their own takes longer than the padding that it avoids
MAX_PADDING = 0.25  # the largest share of padding in a group of more than `MIN_BUCKET_TOKENS` tokens


def n_padded(lengths: np.ndarray, max_tokens: int | None = None) -> int:
    """Return the tokens of all buckets of `bucket_by_length`, padding included."""
    return sum(len(bucket) * int(lengths[bucket].max()) for bucket in bucket_by_length(lengths, max_tokens))


def bucket_by_length(lengths: np.ndarray, max_tokens: int | None = None) -> Iterator[np.ndarray]:
    """Yield the indices of sequences in groups of similar length, the longest first.

    Args:
        lengths: The number of tokens of each sequence, (S,).
        max_tokens: The most tokens of a group, padding included; a longer sequence is a group by itself. None sets no
            bound.

    Example:
        >>> [group.tolist() for group in bucket_by_length(np.array([100, 900, 90]))]
        [[1], [0, 2]]
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = max(int(lengths[order[start]]), 1)
        end, n_real = start, 0
        while end < len(order):
            n_padded = (end + 1 - start) * width
            n_real += int(lengths[order[end]])
            if end > start and max_tokens is not None and n_padded > max_tokens:
                break
            if n_padded > MIN_BUCKET_TOKENS and n_real < (1 - MAX_PADDING) * n_padded:
                break
            end += 1
        yield order[start:end]
        start = end
