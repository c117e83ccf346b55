"""The DailyDialog task: the next reply, or several, in conversations of everyday life.

The data set has 13,118 dialogues, in which each turn is labelled with its speaker's intent (Li et al., 2017,
"DailyDialog: A Manually Labelled Multi-turn Dialogue Dataset"). The reward is that of OpenRL and RL4LMs: whether the
intent is that of the recorded reply, and METEOR with that reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.episodes.rules import EndReason
from textenv.huggingface.datasets import read_dataset
from textenv.prompts.parts import HELD_OUT, Part
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, RewardLike, check_choice
from textenv.rewards.compose import WeightedSum
from textenv.tasks.each_turn import EachTurn
from textenv.text.named_tokenizer import read_tokenizer
from textenv.text.tokenizer import Tokenizer

INTENTS = ("inform", "question", "directive", "commissive")  # the acts 1 to 4 of the data set, in this order
INTENT_CLASSIFIER = "rajkumarrrk/roberta-daily-dialog-intent-classifier"  # used by RL4LMs and OpenRL
END_OF_UTTERANCE = "__eou__"
TURNS_COLUMNS = ("dialog", "utterances")
ACTS_COLUMNS = ("act", "acts")


class Dialogue(NamedTuple):
    """A conversation of two people who take turns, with the intent of each turn as an index into `INTENTS`."""

    turns: tuple[str, ...]
    intents: tuple[int, ...]


Dialogues: TypeAlias = str | PathLike[str] | Sequence[Dialogue]


def read_dialogues(data: str | PathLike[str], split: str | None = None) -> list[Dialogue]:
    r"""Read dialogues from a folder of the original files, or from a data set by its name on the Hugging Face hub.

    The files are `dialogues_<split>.txt`, with one dialogue per line and `__eou__` after each turn, and
    `dialogues_act_<split>.txt`, with the acts (1 to 4) of the dialogue on the same line. A data set on the hub has the
    columns `dialog` or `utterances`, and `act` or `acts`. Each run of white space in a turn becomes a single space.

    Args:
        data: The folder, or the data set's name.
        split: "train", "validation" or "test". By default, the only split of a folder, and "train" of a data set.

    Raises:
        ValueError: If the split is missing, a folder has several and none is named, or turns and acts do not match; the
            message names file and line.

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
        *turns, rest = text.split(END_OF_UTTERANCE)  # the last turn is closed as well, so `rest` is blank
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
        present = [name for name in names if name in row]
        if not present:
            raise ValueError(f"Expected {where} to have one of the columns {names}, got {list(row)}.")
        columns.append(row[present[0]])
    return _dialogue(columns[0], columns[1], where)


def _dialogue(turns: Sequence[str], acts: Sequence[int], where: str) -> Dialogue:
    if len(turns) != len(acts):
        raise ValueError(f"Expected an act for each turn of {where}, got {len(acts)} of {len(turns)} turns.")
    if not all(1 <= act <= len(INTENTS) for act in acts):
        raise ValueError(f"Expected the acts of {where} in 1 to {len(INTENTS)}, got {list(acts)}.")
    # Acts count from 1, indices into `INTENTS` from 0.
    return Dialogue(tuple(" ".join(turn.split()) for turn in turns), tuple(int(act) - 1 for act in acts))


def split_dialogues(
    dialogues: Sequence[Dialogue], held_back: float = HELD_OUT, seed: int = 0
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Draw at random which dialogues to train on and which to hold back, and return both lists.

    Dialogues with the same turns are kept only once.

    Args:
        dialogues: The dialogues.
        held_back: The share that is held back.
        seed: The seed of the draw.

    Raises:
        ValueError: If one of the two lists would be empty.

    Example:
        >>> train, held_back = split_dialogues([Dialogue((f"Hi {i} .", "Hi ."), (0, 0)) for i in range(20)])
        >>> len(train), len(held_back)
        (18, 2)
    """
    by_turns: dict[tuple[str, ...], Dialogue] = {}
    for dialogue in dialogues:
        by_turns.setdefault(dialogue.turns, dialogue)
    distinct = list(by_turns.values())
    n_held_back = round(held_back * len(distinct))
    if not 0 < n_held_back < len(distinct):
        raise ValueError(
            f"Expected `held_back` to leave dialogues on both sides, got {held_back} of {len(distinct)} dialogues."
        )
    # The draw decides which dialogues are held back; both lists keep the order of the file.
    order = np.random.default_rng(seed).permutation(len(distinct)).tolist()
    return [distinct[i] for i in sorted(order[n_held_back:])], [distinct[i] for i in sorted(order[:n_held_back])]


def dialogue_rows(dialogues: Sequence[Dialogue], history: int = 5, separator: str = "\n") -> list[dict[str, Any]]:
    r"""Return a row for every reply, that is, for every turn of a dialogue but the first.

    Args:
        dialogues: The dialogues.
        history: The most turns before the reply that its prompt contains.
        separator: The text after each turn of a prompt.

    Returns:
        Rows with `prompt` (the turns before, each followed by the separator), `references` (the recorded reply),
        `intent` (its index into `INTENTS`) and `exchanges` (the rest of the dialogue, as mappings of the `other`
        speaker's turn, the recorded `reply` to it, and the reply's `intent`).

    Raises:
        ValueError: If `history` is below 1.

    Example:
        >>> row = dialogue_rows([Dialogue(("Hi .", "Who is there ?", "Me ."), (0, 1, 0))])[1]
        >>> row["prompt"], row["references"], row["intent"], row["exchanges"]
        ('Hi .\nWho is there ?\n', ['Me .'], 0, [])
    """
    if history < 1:
        raise ValueError(f"Expected `history` to be at least 1, got {history}.")
    rows = []
    for turns, intents in dialogues:
        for i in range(1, len(turns)):
            exchanges = [
                {"other": turns[later - 1], "reply": turns[later], "intent": intents[later]}
                for later in range(i + 2, len(turns), 2)  # speakers alternate: these turns are the policy's, too
            ]
            prompt = "".join(turn + separator for turn in turns[max(i - history, 0) : i])
            row = {"prompt": prompt, "references": [turns[i]], "intent": intents[i], "exchanges": exchanges}
            rows.append(row)
    return rows


def intent_and_meteor(
    classifier: Any, tokenizer: Any = None, weights: Mapping[str, float] | None = None
) -> BatchReward:
    """Return OpenRL's and RL4LMs' reward without its KL penalty: the weighted sum of `intent` and `meteor`.

    `intent` is 1 if the intent that the classifier predicts for the written reply is that of the recorded reply, else
    0; `meteor` is in [0, 1].

    Args:
        classifier: A text classifier whose labels are `INTENTS` in their order: a name on the hub, a folder, or a model
            with its `tokenizer`.
        tokenizer: The classifier's tokenizer, if `classifier` is a model.
        weights: The weights of "intent" and "meteor"; the default of each is 1.
    """
    intent = {"name": "classifier", "model": classifier, "tokenizer": tokenizer}
    summands: dict[str, RewardLike] = {
        "intent": {**intent, "label_column": "intent", "output": "label"},
        "meteor": "meteor",
    }
    return WeightedSum(summands, weights or {})


class DailyDialog(TextEnv):
    r"""The next reply of a conversation: `gymnasium.make("textenv/DailyDialog-v0", data=..., tokenizer=...)`.

    A prompt is the last turns of a dialogue, each followed by the separator; a reply ends with the separator or the end
    token. By default a reply earns 1 if its intent, predicted by a classifier, is that of the recorded reply, plus its
    METEOR with the recorded reply. This is OpenRL's reward without its KL penalty, for which there is
    `agents.KLPenalty`.

    With `max_turns` of 2 or more, an episode continues: the other speaker's recorded turn follows (the policy observes
    it, and is not trained on it), and the policy replies again. The episode ends with the dialogue, or before a turn of
    the other speaker of more than `max_response_tokens`. Its reward is the mean over the recorded replies of the
    episode, each compared with the written reply at its position (`EachTurn`). Replies that were not written, because
    all turns share `max_new_tokens`, earn 0.

    Args:
        data: A folder or a data set's name, as for `read_dialogues`, or dialogues, as from `split_dialogues`.
        tokenizer: The policy's tokenizer.
        reward: A reward of a single reply in place of the default, whatever `max_turns` is.
        classifier: The intent classifier of the default reward: a name on the hub, or a folder.
        split: The split of `data`.
        part: "train" or "held_out", the two lists that `split_dialogues` draws; by default, all dialogues.
        history: The most turns of a prompt.
        separator: The text that ends a turn.
        max_turns: The most replies of an episode.
        max_response_tokens: The most tokens of the other speaker's turns, separators included; for `max_turns` over 1.
        truncation_side: The side on which a prompt of more than `max_prompt_tokens` is cut.
        **kwargs: Other arguments of `TextEnv`: `max_new_tokens`, `max_prompt_tokens`, `score_at`, `seed`, ...

    Raises:
        ValueError: If `read_dialogues` or `TextEnv` raises it.

    Example:
        >>> from textenv import CharTokenizer
        >>> talk = [Dialogue(("hi", "who is there?", "me", "come in!"), (0, 1, 0, 2))]
        >>> env = DailyDialog(talk, CharTokenizer("\n !?abcdehimnorstw"), reward="meteor", score_at="done")
        >>> [(str(prompt), prompt.references) for prompt in env.prompts][1]
        ('hi\nwho is there?\n', ['me'])
    """

    def __new__(cls, *args: Any, max_turns: int = 1, **kwargs: Any) -> DailyDialog:
        """Return an instance of `Conversation` if there are several turns."""
        # Python calls `__init__` on the result, since `Conversation` is a subclass.
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
            rows = [_shortened(row, tokenizer, separator, max_turns, max_response_tokens) for row in rows]
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
    """A `DailyDialog` with several turns; `DailyDialog(..., max_turns=2)` makes one."""

    def respond(self, prompt: Prompt, preds: Preds) -> str | None:
        """Return the other speaker's next recorded turn, or None if the dialogue is over."""
        exchanges, n_replies = prompt.row["exchanges"], len(preds.turns)
        if n_replies > len(exchanges):
            return None
        # A reply that ended by the stop string already has the separator at its end.
        opening = "" if preds.end_reason is EndReason.STOP else self.separator
        return f"{opening}{exchanges[n_replies - 1]['other']}{self.separator}"


def _shortened(
    row: dict[str, Any], tokenizer: Tokenizer, separator: str, max_turns: int, max_response_tokens: int
) -> dict[str, Any]:
    """Return the row with only the exchanges that an episode may reach."""
    kept = []
    for exchange in row["exchanges"][: max_turns - 1]:
        longest = f"{separator}{exchange['other']}{separator}"
        if len(tokenizer.encode(longest, add_special_tokens=False)) > max_response_tokens:
            break
        kept.append(exchange)
    return {**row, "exchanges": kept}
