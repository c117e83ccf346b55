"""DailyDialog: conversations of everyday life, in which the next reply is written, as it or better was written then.

13,118 dialogues, each turn labelled with its speaker's intent (Li et al., 2017, "DailyDialog: A Manually Labelled
Multi-turn Dialogue Dataset"). The reward is OpenRL's and RL4LMs': the intent of the true reply, and METEOR with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from textenv.completion import Preds
from textenv.env import TextEnv
from textenv.episode import EndReason
from textenv.hub import read_dataset
from textenv.named_tokenizer import read_tokenizer
from textenv.prompts import Prompt
from textenv.rewards.base import BatchReward, RewardLike, check_choice
from textenv.rewards.compose import WeightedSum
from textenv.tasks.each_turn import EachTurn
from textenv.tasks.parts import HELD_OUT, Part
from textenv.tokenizer import Tokenizer

INTENTS = ("inform", "question", "directive", "commissive")  # the acts 1 to 4 of the data set
INTENT_CLASSIFIER = "rajkumarrrk/roberta-daily-dialog-intent-classifier"  # the one of RL4LMs and OpenRL
END_OF_UTTERANCE = "__eou__"
TURNS_COLUMNS = ("dialog", "utterances")
ACTS_COLUMNS = ("act", "acts")


class Dialogue(NamedTuple):
    """A conversation of two who take turns, and the intent of each turn: a place in `INTENTS`."""

    turns: tuple[str, ...]
    intents: tuple[int, ...]


Dialogues: TypeAlias = str | PathLike[str] | Sequence[Dialogue]


def read_dialogues(data: str | PathLike[str], split: str | None = None) -> list[Dialogue]:
    r"""Read dialogues from a folder of the original files, or by name from the Hugging Face hub.

    The files are `dialogues_<split>.txt`, a dialogue a line with `__eou__` behind each turn, and
    `dialogues_act_<split>.txt`, the acts of the same line, 1 to 4. Of a data set on the hub the columns `dialog` or
    `utterances` and `act` or `acts` are read. White space in a turn becomes single spaces.

    Args:
        data: The folder, or the data set's name.
        split: "train", "validation" or "test". Unset, the only one of a folder, and "train" of the hub.

    Raises:
        ValueError: If the split is not there, a folder has several and none is named, or turns and acts do not match;
            the message names file and line.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "dialogues_test.txt").write_text("Hi . __eou__ Who is there ? __eou__\n")
        >>> _ = (folder / "dialogues_act_test.txt").write_text("1 2\n")
        >>> read_dialogues(folder)
        [Dialogue(turns=('Hi .', 'Who is there ?'), intents=(0, 1))]
    """
    folder = Path(data)
    texts = {path.stem.split("_", 1)[1]: path for path in sorted(folder.glob("dialogues_*.txt"))}
    splits = [name for name in texts if not name.startswith(("act_", "emotion_"))]
    if not splits:
        rows = read_dataset(data, split or "train")
        return [_read_row(row, f"row {number} of {fspath(data)!r}") for number, row in enumerate(rows)]
    if split is None and len(splits) == 1:
        [split] = splits
    if split not in splits:
        raise ValueError(f"Expected `split` to be one of {splits}, which are in {fspath(data)!r}, got {split!r}.")
    return _read_files(folder / f"dialogues_{split}.txt", folder / f"dialogues_act_{split}.txt")


def _read_files(text_file: Path, act_file: Path) -> list[Dialogue]:
    if not act_file.is_file():
        raise ValueError(f"Expected the acts of {text_file.name} beside it, got no file {fspath(act_file)!r}.")
    texts, acts = (_lines(file) for file in (text_file, act_file))
    if len(texts) != len(acts):
        raise ValueError(f"Expected as many lines in {act_file} as in {text_file.name}, got {len(acts)}, {len(texts)}.")
    dialogues = []
    for number, (text, line) in enumerate(zip(texts, acts, strict=True), start=1):
        *turns, rest = text.split(END_OF_UTTERANCE)
        where = f"line {number} of {text_file}"
        if rest.strip():
            raise ValueError(f"Expected {END_OF_UTTERANCE} behind each turn of {where}, got {rest.strip()!r:.80} last.")
        dialogues.append(_dialogue(turns, [int(act) for act in line.split()], where))
    return dialogues


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def _read_row(row: Mapping[str, Any], where: str) -> Dialogue:
    columns = []
    for names in (TURNS_COLUMNS, ACTS_COLUMNS):
        found = [name for name in names if name in row]
        if not found:
            raise ValueError(f"Expected {where} to have one of the columns {names}, got {list(row)}.")
        columns.append(row[found[0]])
    return _dialogue(columns[0], columns[1], where)


def _dialogue(turns: Sequence[str], acts: Sequence[int], where: str) -> Dialogue:
    if len(turns) != len(acts):
        raise ValueError(f"Expected an act for each turn of {where}, got {len(acts)} of {len(turns)} turns.")
    if not all(1 <= act <= len(INTENTS) for act in acts):
        raise ValueError(f"Expected the acts of {where} in 1 to {len(INTENTS)}, got {list(acts)}.")
    return Dialogue(tuple(" ".join(turn.split()) for turn in turns), tuple(int(act) - 1 for act in acts))


def split_dialogues(
    dialogues: Sequence[Dialogue], held_back: float = HELD_OUT, seed: int = 0
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Return dialogues to train on and dialogues held back, drawn whole: no dialogue has turns on both sides.

    A dialogue that is there twice, word for word, is kept once.

    Args:
        dialogues: The dialogues.
        held_back: The share that is held back.
        seed: Of the draw.

    Raises:
        ValueError: If nothing would be left on one side.
    """
    first: dict[tuple[str, ...], Dialogue] = {}
    for one in dialogues:
        first.setdefault(one.turns, one)
    distinct = list(first.values())
    n_held_back = round(held_back * len(distinct))
    if not 0 < n_held_back < len(distinct):
        raise ValueError(
            f"Expected `held_back` to leave dialogues on both sides, got {held_back} of {len(distinct)} dialogues."
        )
    order = np.random.default_rng(seed).permutation(len(distinct)).tolist()
    return [distinct[i] for i in sorted(order[n_held_back:])], [distinct[i] for i in sorted(order[:n_held_back])]


def dialogue_rows(dialogues: Sequence[Dialogue], history: int = 5, separator: str = "\n") -> list[dict[str, Any]]:
    r"""Return a row for every reply, that is, every turn but the first of a dialogue.

    Args:
        dialogues: The dialogues.
        history: How many of the turns before the reply are in its prompt, at most.
        separator: What stands behind each turn of a prompt.

    Returns:
        Rows of `prompt` (the turns before, each closed by the separator), `references` (the true reply), `intent` (its
        label, a place in `INTENTS`) and `exchanges`: what comes after, as pairs of the `other`'s turn and the true
        `reply` to it with its `intent`.

    Example:
        >>> row = dialogue_rows([Dialogue(("Hi .", "Who is there ?", "Me ."), (0, 1, 0))])[1]
        >>> row["prompt"], row["references"], row["intent"], row["exchanges"]
        ('Hi .\nWho is there ?\n', ['Me .'], 0, [])
    """
    if history < 1:
        raise ValueError(f"Expected `history` to be at least 1, got {history}.")
    rows = []
    for turns, intents in dialogues:
        for place in range(1, len(turns)):
            before = turns[max(place - history, 0) : place]
            exchanges = [
                {"other": turns[later - 1], "reply": turns[later], "intent": intents[later]}
                for later in range(place + 2, len(turns), 2)
            ]
            prompt = "".join(turn + separator for turn in before)
            row = {"prompt": prompt, "references": [turns[place]], "intent": intents[place], "exchanges": exchanges}
            rows.append(row)
    return rows


def intent_and_meteor(
    classifier: Any, tokenizer: Any = None, weights: Mapping[str, float] | None = None
) -> BatchReward:
    """Return the reward of OpenRL and RL4LMs without its KL penalty: `intent` + `meteor`, both in [0, 1].

    `intent` is 1 where the classifier predicts for what was written the labelled intent of the true reply, else 0.

    Args:
        classifier: A text classifier whose labels are those of `INTENTS` in their order: a name on the hub, a folder,
            or a model with its `tokenizer`.
        tokenizer: The classifier's own, where it is a model.
        weights: The factors of the two; 1 where not given.
    """
    intent = {"name": "classifier", "model": classifier, "tokenizer": tokenizer}
    parts: dict[str, RewardLike] = {
        "intent": {**intent, "label_column": "intent", "output": "label"},
        "meteor": "meteor",
    }
    return WeightedSum(parts, weights or {})


class DailyDialog(TextEnv):
    r"""Write the next reply of a conversation: `gymnasium.make("textenv/DailyDialog-v0", data=..., tokenizer=...)`.

    A prompt is the last turns of the dialogue, each closed by the separator; the reply is over with the separator or
    the end token. By default it earns 1 if a classifier reads in it the intent of the true reply, plus its METEOR with
    the true reply (OpenRL's reward without the KL penalty, which is `agents.KLPenalty`).

    With `max_turns` of 2 or more an episode goes on: the other speaker says what was said then (observed, never
    trained), and the policy replies again. It ends with the dialogue, or before a turn of the other of more than
    `max_response_tokens`. Its reward is the mean over the true replies it had room for, each held against the reply in
    its place (`EachTurn`); what was not written for lack of `max_new_tokens`, which all turns share, earns 0.

    Args:
        data: A folder or a data set's name, as for `read_dialogues`, or dialogues, as from `split_dialogues`.
        tokenizer: The policy's tokenizer.
        reward: Instead of the default; of one reply, also with `max_turns`.
        classifier: The intent classifier of the default reward: a name on the hub or a folder.
        split: The split of `data`.
        part: Dialogues to train on, or the tenth that is held back, as `split_dialogues` draws them; all by default.
        history: How many turns a prompt has at most.
        separator: What closes a turn.
        max_turns: The most replies of an episode.
        max_response_tokens: The longest turn of the other between two replies, separators included; unused with one.
        truncation_side: Where a prompt of more than `max_prompt_tokens` is cut.
        **kwargs: Other arguments of `TextEnv`: `max_new_tokens`, `max_prompt_tokens`, `score_at`, `seed`, ...

    Raises:
        ValueError: As `read_dialogues` and `TextEnv` do.

    Example:
        >>> from textenv import CharTokenizer
        >>> talk = [Dialogue(("hi", "who is there?", "me", "come in!"), (0, 1, 0, 2))]
        >>> env = DailyDialog(talk, CharTokenizer("\n !?abcdehimnorstw"), reward="meteor", score_at="done")
        >>> [(str(prompt), prompt.references) for prompt in env.prompts][1]
        ('hi\nwho is there?\n', ['me'])
    """

    def __new__(cls, *args: Any, max_turns: int = 1, **kwargs: Any) -> DailyDialog:
        """Return an instance of the subclass that answers where there are several turns."""
        return super().__new__(Conversation if cls is DailyDialog and max_turns > 1 else cls)

    def __init__(
        self,
        data: Dialogues,
        tokenizer: Tokenizer | str | PathLike[str],
        *,
        reward: RewardLike | None = None,
        classifier: str | PathLike[str] = INTENT_CLASSIFIER,
        split: str | None = None,
        part: Part | None = None,
        history: int = 5,
        separator: str = "\n",
        max_turns: int = 1,
        max_response_tokens: int = 64,
        truncation_side: Literal["left", "right"] | None = "left",
        **kwargs: Any,
    ) -> None:
        tokenizer = read_tokenizer(tokenizer)
        dialogues = read_dialogues(data, split) if isinstance(data, (str, PathLike)) else data
        if part is not None:
            check_choice("part", part, get_args(Part))
            dialogues = split_dialogues(dialogues)[get_args(Part).index(part)]
        rows = dialogue_rows(dialogues, history, separator)
        reward = intent_and_meteor(classifier) if reward is None else reward
        if isinstance(self, Conversation):
            rows = [_within(row, tokenizer, separator, max_turns, max_response_tokens) for row in rows]
            reward = EachTurn(reward, tokenizer, separator)
            kwargs.update(max_turns=max_turns, max_response_tokens=max_response_tokens)
        self.separator = separator
        super().__init__(
            rows,
            tokenizer,
            reward=reward,
            references_column="references",
            truncation_side=truncation_side,
            stop_strings=(separator,),
            **kwargs,
        )


class Conversation(DailyDialog):
    """A `DailyDialog` of several turns, which is what `DailyDialog(..., max_turns=2)` makes."""

    def respond(self, prompt: Prompt, preds: Preds) -> str | None:
        """Return what the other speaker said next, or None where the dialogue is over."""
        exchanges, n_replies = prompt.row["exchanges"], len(preds.turns)
        if n_replies > len(exchanges):
            return None
        opening = "" if preds.end_reason is EndReason.STOP else self.separator  # the separator is what stops
        return f"{opening}{exchanges[n_replies - 1]['other']}{self.separator}"


def _within(
    row: dict[str, Any], tokenizer: Tokenizer, separator: str, max_turns: int, max_response_tokens: int
) -> dict[str, Any]:
    """Return the row with as many exchanges as an episode has room for."""
    kept = []
    for exchange in row["exchanges"][: max_turns - 1]:
        longest = f"{separator}{exchange['other']}{separator}"
        if len(tokenizer.encode(longest, add_special_tokens=False)) > max_response_tokens:
            break
        kept.append(exchange)
    return {**row, "exchanges": kept}
