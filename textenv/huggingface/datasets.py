"""Data sets by their name on the Hugging Face hub, or from a folder in the hub's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from textenv.checks.extras import needs


def read_dataset(name: str | PathLike[str], split: str = "train", **options: Any) -> Sequence[Mapping[str, Any]]:
    """Return the rows of one split, which `datasets.load_dataset` maps from disk rather than reads into memory.

    The result is a `datasets.Dataset`: `TextEnv(prompts=read_dataset(name))` reads a row when it deals it. With the
    environment variable HF_HUB_OFFLINE=1 only folders and data sets already on this machine are found.

    Args:
        name: A data set's name on the hub, or a folder of .parquet, .jsonl or .csv files named after their split.
        split: The split, such as "train", "test" or "train[:10%]".
        options: Other arguments of `datasets.load_dataset`, such as `revision`.

    Raises:
        ImportError: If datasets is not installed: `pip install "textenv[hub]"`.
        ValueError: If there is no such data set or split; the message says what was tried and why it failed.

    Example:
        >>> read_dataset("cornell-movie-review-data/rotten_tomatoes")[0]["label"]  # doctest: +SKIP
        1
    """
    with needs("hub", "datasets", f"the data set {fspath(name)!r}"):
        from datasets import load_dataset
    try:
        return load_dataset(fspath(name), split=split, **options)
    except (OSError, ValueError) as error:  # missing, offline, gated, another split, files of two kinds
        raise ValueError(
            f"Expected a folder of .parquet, .jsonl or .csv files or a data set on the hub with the split {split!r}, "
            f"got {fspath(name)!r}, tried as both: {type(error).__name__}: {error} A single file needs no data set: "
            "TextEnv(prompts=path)."
        ) from error
