"""The procedural tasks of reasoning-gym: questions with answers that the library's own functions score.

Written for reasoning_gym 0.1.25. Its traps:

- Most tasks draw item `i` from `Random(seed + i)`, so that the data sets of two neighbouring seeds share all items but
  one. Training and held-out items are therefore parts of one data set, and no question is in both.
- Questions repeat: two terms of one digit make 200 sums, which are two fifths of all draws of one or two digits. If
  no question might be repeated in a part, its last items would all be of the rare kinds.
- `score_answer` gives parts of a point: 0.01 for any text in some tasks, and in many the length of the right answer
  as a share of a text that has it somewhere. A policy that writes all digits earns these.
- `score_answer` may raise an error on a text that is no answer ("zzz" in prime_factorization). Such a text earns 0.
- The scoring of some tasks gives the text to Python's `eval` or to sympy's `parse_expr`, which calls `eval`: a policy
  could run code. These tasks are refused, and so is `composite`, which may contain them.
- Five tasks have no answer of their own (boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour): they can be
  scored, but not shown as solved items.
- Configurations are checked by `assert`, and some tasks evaluate expressions of their own with the operators of the
  configuration: without assertions (Python's -O) a configuration could run code.
- `acre` draws all its items at once, another set for another number of them.
- It pins tabulate 0.9.0 and six other packages, of which pycosat needs a C compiler.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, get_args

from textenv.checks.extras import needs
from textenv.checks.signatures import check_arguments, nearest
from textenv.env import TextEnv
from textenv.episodes.completion import Preds
from textenv.prompts.parts import Part
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import RowReward, check_choice
from textenv.text.tokenizer import Tokenizer

MARK = "Answer:"
QUESTION = "{question}"
OWN_KEYS = ("seed", "size")  # keys of every configuration that `ReasoningItems` sets
# The tasks whose `score_answer` evaluates the text, and the one that may contain them.
EVALUATED = (
    "binary_matrix", "composite", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
    "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
)  # fmt: skip


def extract_answer(text: str, pattern: str | None = None) -> str | None:
    r"""Return the answer in a text, without white space around it, or None if there is none.

    Args:
        text: The text.
        pattern: A regular expression: its last match is the answer, or the first group of the match if it has groups.
            None is the line behind the last "Answer:", or the last line of a text without it; blank lines do not count.

    Example:
        >>> extract_answer("3 + 4 makes 7.\nAnswer: 7\nRight?"), extract_answer("so:\n 7\n"), extract_answer(" ")
        ('7', '7', None)
        >>> extract_answer("it is <answer>7</answer>", "<answer>(.*?)</answer>"), extract_answer("7", "<answer>")
        ('7', None)
    """
    if pattern is None:
        _, mark, rest = text.rpartition(MARK)
        lines = [line for line in rest.splitlines() if line.strip()]
        answer = lines[0 if mark else -1] if lines else ""
    else:
        matches = list(re.finditer(pattern, text))
        answer = (matches[-1].group(min(1, len(matches[-1].groups()))) or "") if matches else ""
    return answer.strip() or None


def _make_dataset(name: str, config: Mapping[str, Any], **own: int) -> Any:
    """Return a data set of reasoning-gym.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If the task is unknown, evaluates texts, or refuses its configuration.
    """
    with needs("reasoning", "reasoning_gym", "ReasoningGym"):
        from reasoning_gym.factory import DATASETS, create_dataset

    if sys.flags.optimize:
        raise ValueError(
            "Expected Python with assertions, by which reasoning-gym checks its configurations, got -O: leave out -O "
            "and PYTHONOPTIMIZE."
        )
    if name not in DATASETS:
        raise ValueError(f"Expected a task of reasoning-gym, got {name!r}{nearest(name, DATASETS)}")
    if name in EVALUATED:
        raise ValueError(
            f"Expected a task whose scoring reads a text without running it, got {name!r}: reasoning-gym evaluates its "
            "answers as Python, so that a policy could run code. Take another task."
        )
    check_arguments(DATASETS[name][1], config, f"`config` of {name!r}", without=OWN_KEYS)
    try:
        return create_dataset(name, **config, **own)
    except Exception as error:  # its checks are `assert`, and a value of another type fails anywhere
        raise ValueError(f"Expected a `config` that {name!r} takes, got {dict(config)}: {error}.") from error


def _score(dataset: Any, answer: str, item: Mapping[str, Any]) -> float:
    """Return the library's score of an answer, and 0 where it raises an error or returns no finite number."""
    try:
        score = float(dataset.score_answer(answer, dict(item)))
    except Exception:  # it parses the answer: whatever it raises, the text is not the answer
        return 0.0
    return score if math.isfinite(score) else 0.0


@dataclass
class ReasoningItems:
    r"""The items of a task of reasoning-gym, some of them to train on and others held out.

    All are drawn with one seed. The first `n_held_out` different questions are held out, and the items to train on are
    those of the next `size` draws that are none of them, a question as often as it is drawn. So no question is in both
    parts, and more items to train on change no held-out item. Questions of a kind that has few (sums of one digit) are
    rarer among the items to train on; `config` (`min_digits: 2`) leaves such a kind out.

    Args:
        name: The task, such as "chain_sum"; `reasoning_gym.factory.DATASETS` has all.
        config: The task's own settings, such as `{max_terms: 2, max_digits: 1}`, except `seed` and `size`.
        size: The number of items to train on.
        n_held_out: The number of held-out items.
        data_seed: The seed of the items. It is not the run's, so that runs of several seeds are compared on the same
            items.
        chat: Whether a prompt is a chat, which the tokenizer's chat template renders, or a text.
        template: The text of a prompt, with "{question}" in it; in a chat, the text of the user's message. By default
            the question alone in a chat, and else "{question}\nAnswer:".

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If the task is unknown, evaluates texts, refuses its configuration, or has too few different
            questions, or if an argument is out of range.

    Example:
        >>> sums = ReasoningItems("chain_sum", {"max_terms": 2, "max_digits": 1}, size=2, n_held_out=1)
        >>> [row["answer"] for row in sums.rows("train")]  # doctest: +SKIP
        ['3', '6']
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    size: int = 1_000
    n_held_out: int = 300
    data_seed: int = 0
    chat: bool = False
    template: str | None = None

    def __post_init__(self) -> None:
        for argument, least in (("size", 1), ("n_held_out", 0), ("data_seed", 0)):
            if not isinstance(value := getattr(self, argument), int) or value < least:
                raise ValueError(f"Expected `{argument}` to be a whole number of at least {least}, got {value!r}.")
        if not isinstance(self.config, Mapping):
            raise ValueError(f"Expected `config` to be keys with values, got {self.config!r:.80}.")
        if self.template is None:
            self.template = QUESTION if self.chat else f"{QUESTION}\n{MARK}"
        if QUESTION not in self.template:
            raise ValueError(f"Expected `template` to have {QUESTION!r} in it, got {self.template!r:.80}.")

    def rows(self, part: Part) -> list[dict[str, Any]]:
        """Return the rows of a part: `prompt`, and `question`, `answer` and `metadata` as the library made them."""
        check_choice("part", part, get_args(Part))
        return [{"prompt": self._prompt(item["question"]), **item} for item in self._items(part)]

    def solved(self, part: Part) -> list[tuple[Any, str]]:
        """Return pairs of a prompt and its answer, for `agents.sft.tune`; behind a text, the answer follows a space.

        Raises:
            ValueError: If the task has no answers.
        """
        rows = self.rows(part)
        if any(not isinstance(row["answer"], str) for row in rows):
            raise ValueError(f"Expected a task with answers to learn from, got {self.name!r}, which has none.")
        return [(row["prompt"], row["answer"] if self.chat else f" {row['answer']}") for row in rows]

    def _prompt(self, question: str) -> Any:
        text = str(self.template).replace(QUESTION, question)
        return [{"role": "user", "content": text}] if self.chat else text

    def _items(self, part: Part) -> list[dict[str, Any]]:
        """Return the items of a part, checked by the score of the first."""
        n_train = self.size if part == "train" else 0
        most = 4 * (self.n_held_out + n_train) + 1_000  # draws; they bound the time that too few questions take
        dataset = _make_dataset(self.name, self.config, seed=self.data_seed, size=most)
        held_out: dict[str, dict[str, Any]] = {}
        train: list[dict[str, Any]] = []
        for number in range(most):
            if len(held_out) == self.n_held_out and len(train) == n_train:
                break
            item = self._draw(dataset, number)
            if len(held_out) < self.n_held_out:
                held_out.setdefault(item["question"], item)
            elif item["question"] not in held_out:
                train.append(item)
        if len(held_out) < self.n_held_out or len(train) < n_train:
            raise ValueError(
                f"Expected {self.n_held_out} different questions of {self.name!r} to hold out and {n_train} others to "
                f"train on, got {len(held_out)} and {len(train)} in {most} draws: lower `n_held_out`, or widen "
                "`config`."
            )
        items = train if part == "train" else list(held_out.values())
        # An item that is scored wrongly shows that the library has changed; texts that it cannot read earn 0 silently.
        if items and items[0]["answer"] is not None and _score(dataset, items[0]["answer"], items[0]) != 1.0:
            raise ValueError(f"Expected {self.name!r} to give its own answer {items[0]['answer']!r:.80} a score of 1.")
        return items

    def _draw(self, dataset: Any, number: int) -> dict[str, Any]:
        try:
            drawn = dataset[number]
        except Exception as error:  # a value that no check of the library refuses
            raise ValueError(f"Expected items of {self.name!r} with {dict(self.config)}, got: {error}.") from error
        return {key: drawn[key] for key in ("question", "answer", "metadata")}


@dataclass
class ReasoningScore(RowReward):
    """The score that reasoning-gym gives to the answer in a text: 1 for the right one, 0 for any other.

    The library's `score_answer` decides. A text without an answer earns 0, as does one on which it raises an error.

    Args:
        name: The task.
        config: The task's own settings.
        pattern: The rule by which the answer is found, as for `extract_answer`.
        partial_credit: Whether scores between 0 and 1 count as they are, in place of 0. Without them the mean reward is
            the accuracy.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If the task is unknown, evaluates texts, or refuses its configuration, or the pattern is no regular
            expression.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> item = {"question": "4 + 3 =", "answer": "7", "metadata": {}}
        >>> tokenizer = CharTokenizer("78")
        >>> score = ReasoningScore("chain_sum")  # doctest: +SKIP
        >>> score(Prompt("4 + 3 =", row=item), Preds(tokenizer, tokenizer.encode("7")), True)  # doctest: +SKIP
        1.0
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pattern: str | None = None
    partial_credit: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(
                f"Expected `pattern` to be a regular expression, got {self.pattern!r}: {error}."
            ) from error
        self._dataset = _make_dataset(self.name, self.config, seed=0, size=1)  # its items are not used

    def score_row(self, prompt: Prompt, preds: Preds) -> float:
        """Return the score, in [0, 1]."""
        answer = extract_answer(preds.text, self.pattern)
        if answer is None:
            return 0.0
        score = _score(self._dataset, answer, {key: prompt.row[key] for key in ("question", "answer", "metadata")})
        return score if self.partial_credit or score == 1.0 else 0.0


class ReasoningGym(TextEnv):
    r"""Questions of reasoning-gym, whose answers are checked: `gymnasium.make("textenv/ReasoningGym-v0", ...)`.

    Each `prompt.row` has the item's `question`, `answer` and `metadata`; the answer is the prompt's reference. The
    reward is `ReasoningScore`.

    Args:
        name: The task, as for `ReasoningItems`.
        tokenizer: The policy's tokenizer, as for `TextEnv`.
        config: The task's own settings, as for `ReasoningItems`.
        part: The items: those to "train" on, or those that are "held_out".
        size: The number of items to train on.
        n_held_out: The number of held-out items.
        data_seed: The seed of the items; `seed` is that of their order.
        chat: Whether a prompt is a chat, which the tokenizer's chat template renders.
        template: The text of a prompt, as for `ReasoningItems`.
        pattern: The rule by which the answer is found in a text, as for `extract_answer`.
        partial_credit: Whether scores between 0 and 1 count, as for `ReasoningScore`.
        max_new_tokens: The most tokens of a text.
        **kwargs: Other arguments of `TextEnv`, except `reward` and `references_column`.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If `ReasoningItems`, `ReasoningScore` or `TextEnv` raises it.

    Example:
        >>> from textenv import CharTokenizer
        >>> sums = {"max_terms": 2, "max_digits": 1}
        >>> tokenizer = CharTokenizer("".join(map(chr, range(32, 127))) + "\n")
        >>> env = ReasoningGym("chain_sum", tokenizer, config=sums, size=9, n_held_out=9)  # doctest: +SKIP
        >>> env.prompts[0].references  # doctest: +SKIP
        ['-5']
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer | str | PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        part: Part = "train",
        size: int = 1_000,
        n_held_out: int = 300,
        data_seed: int = 0,
        chat: bool = False,
        template: str | None = None,
        pattern: str | None = None,
        partial_credit: bool = False,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> None:
        config = {} if config is None else config
        rows = ReasoningItems(name, config, size, n_held_out, data_seed, chat, template).rows(part)
        has_answers = all(isinstance(row["answer"], str) for row in rows)
        super().__init__(
            rows,
            tokenizer,
            reward=ReasoningScore(name, config, pattern, partial_credit),
            references_column="answer" if has_answers else None,
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
