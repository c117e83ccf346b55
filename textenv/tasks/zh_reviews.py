"""The task of writing a favourable Chinese review, on rankings of reviews from the most to the least favourable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np

from textenv.env import TextEnv
from textenv.prompts.parts import HELD_OUT, Part
from textenv.rewards.base import RewardLike, check_choice
from textenv.text.tokenizer import Tokenizer

FILE = "ranked.tsv"
# "The parcel just came, it feels", "honestly, it is really very", "the experience of this purchase was on the whole
# very", "this film is very": the prompts of a Chinese tutorial of TRL.
PROMPTS = ("刚收到货，感觉", "说实话，真的很", "这次购物总的来说体验很", "这部电影很")

Rankings: TypeAlias = Sequence[tuple[str, ...]]


def read_rankings(data: str | PathLike[str]) -> list[tuple[str, ...]]:
    r"""Read rankings of reviews from the file `ranked.tsv` (UTF-8) in a folder.

    Each line is one ranking, best review first, with tabs between the reviews. Rankings may have different lengths. A
    repeated line is read once; a review may be in several lines (see `split_rankings`). Blank lines are skipped.

    Raises:
        ValueError: If there is no such folder or file, or a line has fewer than two reviews, an empty review or a
            repeated one; the message names file and line.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "ranked.tsv").write_text("很好\t还行\t很差\n不错\t垃圾\n", encoding="utf-8")
        >>> read_rankings(folder)
        [('很好', '还行', '很差'), ('不错', '垃圾')]
    """
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(
            f"Expected `data` to be a folder that holds {FILE}, got {fspath(data)!r}, which is none. "
            "They are not on the Hugging Face hub, so pass their folder."
        )
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"Expected the file {FILE} in {fspath(data)!r}, got a folder without it.")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # "-sig": without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {fspath(file)!r} in UTF-8, got bytes that are not: {error}.") from error
    rankings = [_read_line(line, f"line {number} of {file}") for number, line in enumerate(lines, 1) if line.strip()]
    return list(dict.fromkeys(rankings))  # a repeated line once, in the order of the file


def _read_line(line: str, where: str) -> tuple[str, ...]:
    texts = tuple(text.strip() for text in line.split("\t"))
    if len(texts) < 2:
        raise ValueError(f"Expected two reviews or more on {where}, with tabs between, got {line!r:.80}.")
    if not all(texts):
        raise ValueError(f"Expected no empty review on {where}, got one in place {texts.index('') + 1}.")
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"Expected each review once on {where}, got {twice!r:.80} in two places of the ranking.")
    return texts


def split_rankings(rankings: Rankings, shares: Mapping[str, float], seed: int = 0) -> dict[str, list[tuple[str, ...]]]:
    """Divide the rankings at random into parts that have no review in common.

    Rankings that share a review, directly or through other rankings, stay together.

    Args:
        rankings: The rankings.
        shares: The size of each part by its name, relative to the sum of all.
        seed: The seed of the draw.

    Raises:
        ValueError: If a part would be empty.

    Example:
        >>> parts = split_rankings([("a", "b"), ("c", "d"), ("b", "e"), ("f", "g")], {"train": 0.75, "held_out": 0.25})
        >>> len(parts["train"]), {"a", "e"} & {text for texts in parts["held_out"] for text in texts}
        (3, set())
    """
    groups = _groups(rankings)
    # Largest groups first, each to the part that lacks most rankings, so that the sizes come out near the shares.
    order = sorted(np.random.default_rng(seed).permutation(len(groups)), key=lambda i: -len(groups[i]))
    sizes_due = {name: share * len(rankings) / sum(shares.values()) for name, share in shares.items()}
    parts: dict[str, list[tuple[str, ...]]] = {name: [] for name in shares}
    for i in order:
        most_lacking = max(parts, key=lambda name: sizes_due[name] - len(parts[name]))
        parts[most_lacking] += groups[i]
    if not all(parts.values()):
        sizes = {name: len(part) for name, part in parts.items()}
        raise ValueError(f"Expected rankings in every part of {dict(shares)}, got {sizes} of {len(rankings)} rankings.")
    return parts


def _groups(rankings: Rankings) -> list[list[tuple[str, ...]]]:
    """Return the rankings in groups that have no review in common."""
    groups: dict[int, list[int]] = {}  # the indices of a group's rankings, by the index of its latest one
    group_of: dict[str, int] = {}
    for index, texts in enumerate(rankings):
        joined = sorted({group_of[text] for text in texts if text in group_of})
        groups[index] = [index, *(member for key in joined for member in groups.pop(key))]
        for member in groups[index]:
            group_of.update(dict.fromkeys(rankings[member], index))
    return [[rankings[index] for index in sorted(group)] for group in groups.values()]


def part_of(rankings: Rankings, part: Part) -> list[tuple[str, ...]]:
    """Return the rankings to train on, or the tenth that `split_rankings` holds out, which is always the same.

    Example:
        >>> rankings = [(f"{i} good", f"{i} bad") for i in range(20)]
        >>> len(part_of(rankings, "train")), len(part_of(rankings, "held_out"))
        (18, 2)
    """
    check_choice("part", part, get_args(Part))
    return split_rankings(rankings, {"train": 1 - HELD_OUT, "held_out": HELD_OUT})[part]


class ZhReviews(TextEnv):
    """Chinese reviews, continued from their first characters: `gymnasium.make("textenv/ZhReviews-v0", ...)`.

    Half of the prompts are `PROMPTS`, repeated in turn; the other half are the distinct beginnings of the reviews.

    Args:
        data: The folder of the rankings, as for `read_rankings`, or rankings, as from `split_rankings`.
        tokenizer: The policy's tokenizer; `agents.char_tokenizer` makes one that knows Chinese.
        reward: The reward, as for `TextEnv`, such as `textenv.rewards.preference.Preference` with a reward model that
            was trained on the rankings.
        part: "train", or the tenth that is "held_out" (see `part_of`); by default, all rankings.
        n_characters: The number of a review's characters that make a prompt. Reviews without more are left out.
        max_new_tokens: The most tokens of a completion.
        **kwargs: Other arguments of `TextEnv`.

    Raises:
        ValueError: If no review is longer than a prompt, or if `read_rankings` or `TextEnv` raises it.

    Example:
        >>> from textenv import CharTokenizer
        >>> tokenizer = CharTokenizer("".join(sorted(set("".join(PROMPTS)) | set("质量好太差"))))
        >>> env = ZhReviews([("质量好", "质量太差")], tokenizer, reward=lambda prompt, preds, done: 0.0, n_characters=2)
        >>> [str(prompt) for prompt in env.prompts]
        ['质量', '刚收到货，感觉']
    """

    def __init__(
        self,
        data: str | PathLike[str] | Rankings,
        tokenizer: Tokenizer | str | PathLike[str],
        *,
        reward: RewardLike | None = None,
        part: Part | None = None,
        n_characters: int = 3,
        max_new_tokens: int = 32,
        **kwargs: Any,
    ) -> None:
        rankings = read_rankings(data) if isinstance(data, (str, PathLike)) else data
        rankings = rankings if part is None else part_of(rankings, part)
        beginnings = openings(rankings, n_characters)
        prompts = [prompt for i, text in enumerate(beginnings) for prompt in (text, PROMPTS[i % len(PROMPTS)])]
        super().__init__(prompts, tokenizer, reward=reward, max_new_tokens=max_new_tokens, **kwargs)


def openings(rankings: Rankings, n_characters: int) -> list[str]:
    """Return the distinct beginnings, of `n_characters` each, of all longer reviews, in the order of the reviews.

    Raises:
        ValueError: If `n_characters` is below 1, or no review is longer.

    Example:
        >>> openings([("不错，很好", "差"), ("不错", "不贵，不错")], 2)
        ['不错', '不贵']
    """
    if n_characters < 1:
        raise ValueError(f"Expected `n_characters` to be at least 1, got {n_characters}.")
    beginnings = dict.fromkeys(text[:n_characters] for texts in rankings for text in texts if len(text) > n_characters)
    if not beginnings:
        raise ValueError(f"Expected reviews of more than n_characters={n_characters} characters, got none.")
    return list(beginnings)
