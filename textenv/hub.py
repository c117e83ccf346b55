"""Rows of a data set by its name on the Hugging Face hub, or of a folder in the layout of the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any


def read_dataset(name: str | PathLike[str], split: str = "train", **options: Any) -> Sequence[Mapping[str, Any]]:
    """Return the rows of one split through `datasets.load_dataset`, read from disk as they are asked for.

    Args:
        name: A data set's name on the hub, or a folder of .parquet, .jsonl or .csv files.
        split: The split, as "train", "test" or "train[:10%]".
        options: What else `datasets.load_dataset` takes, as `revision`.

    Raises:
        ImportError: Without datasets: `pip install textenv[hub]`.

    Example:
        >>> read_dataset("cornell-movie-review-data/rotten_tomatoes")[0]["label"]  # doctest: +SKIP
        1
    """
    try:
        from datasets import load_dataset  # optional
    except ImportError as error:
        raise ImportError(
            f"Reading the data set {fspath(name)!r} by name needs datasets: pip install textenv[hub]"
        ) from error
    return load_dataset(fspath(name), split=split, **options)
