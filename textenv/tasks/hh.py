r"""Dialogues with an assistant, of which people chose one reply of two: pairs, and the environment of what they share.

The format is that of Anthropic's hh-rlhf (Bai et al., 2022, "Training a Helpful and Harmless Assistant with
Reinforcement Learning from Human Feedback"): turns that open with "\n\nHuman:" and "\n\nAssistant:".
"""

from __future__ import annotations

import gzip
from collections import defaultdict
from collections.abc import Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from textenv.dialogues import ASSISTANT, HUMAN, Pair, split_pair
from textenv.env import TextEnv
from textenv.hub import read_dataset
from textenv.lines import numbered, read_json
from textenv.rewards.base import RewardLike, check_choice
from textenv.tasks.parts import HELD_OUT, Part
from textenv.tokenizer import Tokenizer


def read_pairs(data: str | PathLike[str], split: str = "train") -> list[Pair]:
    """Read pairs from a folder of .jsonl or .jsonl.gz files, or by name from the Hugging Face hub.

    Args:
        data: The folder, of which all such files are read in the order of their names, an object with "chosen" and
            "rejected" a line; or where there is no such folder, a data set on the hub, as "Anthropic/hh-rlhf".
        split: Which of that data set's splits is read; a folder has none.

    Raises:
        ValueError: If the folder has no such file, or a row is malformed; the message names file and line.

    Example:
        >>> len(read_pairs("Anthropic/hh-rlhf"))  # doctest: +SKIP
        160800
    """
    if Path(data).is_dir():
        rows = _file_rows(Path(data))
    else:
        rows = ((row, f"row {number} of {fspath(data)!r}") for number, row in enumerate(read_dataset(data, split)))
    return [split_pair(row, where) for row, where in rows]


def _file_rows(folder: Path) -> Iterator[tuple[Any, str]]:
    """Yield each object of the files, and the file and line where it stands."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise ValueError(f"Expected files that end in .jsonl or .jsonl.gz in {fspath(folder)!r}, got none.")
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
            for number, line in numbered(stream, file):
                where = f"line {number} of {fspath(file)!r}"
                if line.strip():
                    yield read_json(line, where), where


def hold_out(pairs: Sequence[Pair], n: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    r"""Return pairs to train on and `n` pairs held out; dialogues of one first turn are on the same side.

    Args:
        pairs: The pairs.
        n: How many are held out; up to as many more as the last first turn has pairs.
        seed: Of the draw.

    Raises:
        ValueError: If nothing would be left on one side.

    Example:
        >>> one, other = Pair("\n\nHuman: A", " a", " b"), Pair("\n\nHuman: B", " a", " b")
        >>> [len(part) for part in hold_out([one, other, one], 1, seed=1)]
        [1, 2]
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.prompt.partition(ASSISTANT)[0]].append(pair)
    held_out: list[Pair] = []
    train: list[Pair] = []
    firsts = list(groups)
    for place in np.random.default_rng(seed).permutation(len(firsts)):
        (held_out if len(held_out) < n else train).extend(groups[firsts[place]])
    if not held_out or not train:
        raise ValueError(f"Expected `n` to leave pairs on both sides, got {n} of {len(pairs)} pairs.")
    return train, held_out


def part_of(pairs: Sequence[Pair], part: Part) -> list[Pair]:
    """Return the pairs to train on, or the tenth that `hold_out` keeps apart, always the same.

    Example:
        >>> pairs = [Pair(f"{HUMAN} {i}{ASSISTANT}", " a", " b") for i in range(20)]
        >>> len(part_of(pairs, "train")), len(part_of(pairs, "held_out"))
        (18, 2)
    """
    check_choice("part", part, get_args(Part))
    return hold_out(pairs, max(1, round(HELD_OUT * len(pairs))))[get_args(Part).index(part)]


class HH(TextEnv):
    r"""Write the assistant's next reply; `gymnasium.make("textenv/HH-v0", data=..., tokenizer=..., reward=...)`.

    A prompt is what the two dialogues of a pair share, "\n\nAssistant:" included. The reply is over with the end token
    or where the policy opens a turn of the human, which is not part of its text. Each `prompt.row` has `chosen` and
    `rejected`; the chosen reply is the prompt's reference.

    Args:
        data: A folder or a data set's name, as for `read_pairs`, or pairs, as from `hold_out`.
        tokenizer: The policy's, as for `TextEnv`.
        reward: As for `TextEnv`: `{"name": "preference", "model": folder}` is a trained reward model.
        split: The split of a data set on the hub.
        part: Pairs to train on, or the tenth that is held out; see `part_of`. All by default.
        max_new_tokens: The most tokens of a reply.
        max_prompt_tokens: The most tokens of a prompt.
        truncation_side: Where a longer dialogue loses tokens; "left" keeps its last turns.
        **kwargs: What else `TextEnv` takes.

    Raises:
        ValueError: As `read_pairs` and `TextEnv` do.

    Example:
        >>> from textenv import CharTokenizer
        >>> tokenizer = CharTokenizer("\n :AHSaeimnostu")
        >>> pair = Pair("\n\nHuman: Hi\n\nAssistant:", " Hi", " So")
        >>> env = HH([pair], tokenizer, reward={"name": "length", "target": 2}, max_prompt_tokens=12)
        >>> observation, info = env.reset(seed=0)
        >>> print(env.prompts[0].references, tokenizer.decode(env.prompts[0].ids.tolist()).strip())
        [' Hi'] Assistant:
    """

    def __init__(
        self,
        data: str | PathLike[str] | Sequence[Pair],
        tokenizer: Tokenizer | str | PathLike[str],
        *,
        reward: RewardLike | None = None,
        split: str = "train",
        part: Part | None = None,
        max_new_tokens: int = 64,
        max_prompt_tokens: int = 128,
        truncation_side: Literal["left", "right"] | None = "left",
        **kwargs: Any,
    ) -> None:
        pairs = read_pairs(data, split) if isinstance(data, (str, PathLike)) else data
        pairs = pairs if part is None else part_of(pairs, part)
        super().__init__(
            [pair._asdict() for pair in pairs],
            tokenizer,
            reward=reward,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            truncation_side=truncation_side,
            references_column="chosen",
            stop_strings=(HUMAN,),
            **kwargs,
        )
