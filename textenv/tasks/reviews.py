"""The task of continuing film reviews in a better mood: labelled sentences, whose first words are the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from textenv.env import TextEnv
from textenv.huggingface.datasets import read_dataset
from textenv.prompts.parts import HELD_OUT, Part
from textenv.rewards.base import RewardLike, check_choice
from textenv.text.tokenizer import Tokenizer

FILES = ("rt-polarity.neg", "rt-polarity.pos")  # in the order of the labels
LABELS = ("negative", "positive")
# Dashes and quotes in Windows' encoding (cp1252), keyed by the control characters to which Latin-1 decodes their bytes.
WINDOWS = {code: bytes([code]).decode("cp1252", "replace") for code in range(0x80, 0xA0)}


class Review(NamedTuple):
    """A review and its mood, as an index into `LABELS`."""

    text: str
    label: int


def read_reviews(data: str | PathLike[str], split: str = "train+validation+test") -> list[Review]:
    """Read reviews from a folder, or from a data set by its name on the Hugging Face hub.

    The folder is that of the sentence polarity data set v1.0 (Pang and Lee, 2005, "Seeing stars"): `rt-polarity.pos`
    and `rt-polarity.neg`, with one sentence per line, in Latin-1 as it is distributed or in UTF-8.

    Args:
        data: The folder. If there is no such folder, the name of a data set on the hub with the columns `text` and
            `label` (1 is positive), such as "cornell-movie-review-data/rotten_tomatoes".
        split: The splits of that data set to read; a folder has none.

    Raises:
        ValueError: If the folder lacks a file, or the data set lacks a column or has a label other than 0 and 1.

    Example:
        >>> reviews = read_reviews("cornell-movie-review-data/rotten_tomatoes")  # doctest: +SKIP
        >>> len(reviews), reviews[0].label  # doctest: +SKIP
        (10662, 1)
    """
    folder = Path(data)
    if folder.is_dir():
        return [Review(text, label) for label, name in enumerate(FILES) for text in _read_lines(folder / name)]
    reviews = []
    for number, row in enumerate(read_dataset(data, split=split)):
        if not {"text", "label"} <= row.keys() or row["label"] not in (0, 1):
            raise ValueError(
                f"Expected row {number} of {data!r} to have a `text` and a `label` of 0 or 1, got {dict(row)!r:.80}."
            )
        reviews.append(Review(" ".join(row["text"].split()), row["label"]))
    return reviews


def _read_lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(
            f"Expected the files {' and '.join(FILES)} in {str(file.parent)!r}, got a folder without {file.name}."
        )
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:  # the encoding of the file as its authors distribute it
        text = raw.decode("latin-1")
    lines = (" ".join(line.split()) for line in text.translate(WINDOWS).split("\n"))
    return [line for line in lines if line]


def part_of(reviews: Sequence[Review], part: Part) -> list[Review]:
    """Return the reviews to train on, or the tenth that is held out, in a random order that is always the same.

    Example:
        >>> reviews = [Review(str(i), i % 2) for i in range(20)]
        >>> len(part_of(reviews, "train")), len(part_of(reviews, "held_out"))
        (18, 2)
    """
    check_choice("part", part, get_args(Part))
    # Mixed, since all negative reviews come first. The seed is fixed, so that every run holds out the same tenth.
    mixed = [reviews[i] for i in np.random.default_rng(0).permutation(len(reviews))]
    n_held_out = max(1, round(HELD_OUT * len(reviews)))
    return mixed[:n_held_out] if part == "held_out" else mixed[n_held_out:]


class Reviews(TextEnv):
    """Film reviews, continued from their first words: `gymnasium.make("textenv/Reviews-v0", ...)`.

    The reward is the probability of "positive" that a classifier gives to the whole text, or any other reward. Each
    `prompt.row` has the review's `text`, from which the prompt is taken, and its `label`.

    Args:
        data: The reviews, as for `read_reviews`.
        tokenizer: The policy's tokenizer, as for `TextEnv`.
        classifier: The folder or hub name of a classifier with a label "positive", such as `agents.train_classifier`
            trains; it takes the place of `reward`, and needs torch.
        reward: Another reward, as for `TextEnv`.
        part: The reviews that the prompts are taken from: "train", or the tenth that is "held_out"; see `part_of`.
        n_words: The number of a review's words that make a prompt. Reviews without more words are left out.
        max_new_tokens: The most tokens of a completion.
        **kwargs: Other arguments of `TextEnv`.

    Raises:
        ValueError: If both or neither of `classifier` and `reward` are given, or no review is longer than the prompt.

    Example:
        >>> import gymnasium
        >>> data = "cornell-movie-review-data/rotten_tomatoes"
        >>> env = gymnasium.make("textenv/Reviews-v0", data=data, tokenizer=tokenizer, reward="vader")  # doctest: +SKIP
    """

    def __init__(
        self,
        data: str | PathLike[str],
        tokenizer: Tokenizer | str | PathLike[str],
        *,
        classifier: str | PathLike[str] | None = None,
        reward: RewardLike | None = None,
        part: Part = "train",
        n_words: int = 3,
        max_new_tokens: int = 40,
        **kwargs: Any,
    ) -> None:
        if n_words < 1:
            raise ValueError(f"Expected `n_words` to be at least 1, got {n_words}.")
        if classifier is not None:
            if reward is not None:
                raise ValueError("Expected either `classifier` or `reward`, got both.")
            reward = {"name": "classifier", "model": classifier, "label": LABELS[1], "reads": "whole"}
        reviews = [review for review in part_of(read_reviews(data), part) if len(review.text.split()) > n_words]
        if not reviews:
            raise ValueError(f"Expected reviews of more than n_words={n_words} words in {str(data)!r}, got none.")
        rows = [{"prompt": " ".join(review.text.split()[:n_words]), **review._asdict()} for review in reviews]
        super().__init__(rows, tokenizer, reward=reward, max_new_tokens=max_new_tokens, **kwargs)
