"""Rewards made of others: sums, limits, conditions, ensembles, and a memory. A row that one part drops is dropped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from textenv.completion import Preds
from textenv.prompts import Prompt
from textenv.rewarding import DROPPED, Reward, RewardFunction, Score, ScoreAt
from textenv.rewards.base import BatchReward, RewardLike, check_choice, score_rows
from textenv.rewards.registry import read_reward

Scores = Sequence[Score]


def _may_drop(rewards: Sequence[RewardFunction]) -> bool:
    return any(isinstance(reward, BatchReward) and reward.may_drop for reward in rewards)


def _when(rewards: Sequence[RewardFunction]) -> ScoreAt:
    """Return the most frequent `score_at` that one of the rewards needs; a plain function needs every step."""
    wanted = {reward.score_at if isinstance(reward, BatchReward) else "step" for reward in rewards}
    return "step" if "step" in wanted else "rollout_end" if "rollout_end" in wanted else "done"


@dataclass
class WeightedSum(BatchReward):
    """The sum of several rewards, which are logged by name.

    Each is asked for what it is about: in a sum with a function, which is asked at every token, a classifier still sees
    finished texts only. The parts of a part are called "part/its part".

    Args:
        parts: The rewards by name: functions, `BatchReward`s, names, or mappings of name and options.
        weights: The factors by name; 1 where not given.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> from textenv.rewards import Length, Regex
        >>> reward = WeightedSum({"length": Length(4), "form": Regex("a+")}, {"length": 2.0})
        >>> reward(Prompt("a"), Preds(CharTokenizer("ab"), [1, 1, 1]), True)
        {'length': 1.5, 'form': 1.0}
    """

    parts: Mapping[str, RewardLike]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts or not self.weights.keys() <= self.parts.keys():
            raise ValueError(f"Expected weights of the parts {list(self.parts)}, got {dict(self.weights)}.")
        self._rewards = {name: read_reward(part) for name, part in self.parts.items()}
        self.score_at = _when(list(self._rewards.values()))
        self.may_drop = _may_drop(list(self._rewards.values()))

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the named parts of each row."""
        rows: list[dict[str, float]] = [{} for _ in prompts]
        dropped: set[int] = set()
        for name, part in self._rewards.items():
            weight = self.weights.get(name, 1.0)
            for row, reward in enumerate(score_rows(part, prompts, preds, dones)):
                named = {f"{name}/{inner}": value for inner, value in reward.parts.items()} or {name: reward.value}
                rows[row].update({key: weight * value for key, value in named.items()})
                dropped.update([row] if reward.is_dropped else [])
        return [DROPPED if row in dropped else parts for row, parts in enumerate(rows)]


@dataclass
class Clip(BatchReward):
    """A reward kept between two limits, its parts summed.

    Args:
        reward: The reward.
        low: The least; None for no limit.
        high: The most; None for no limit.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> Clip(lambda prompt, preds, done: 7.0, high=1.0)(Prompt("a"), Preds(CharTokenizer("ab"), [1]), True)
        1.0
    """

    reward: RewardLike
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"Expected low <= high, got {self.low} and {self.high}.")
        self._reward = read_reward(self.reward)
        self.score_at = _when([self._reward])
        self.may_drop = _may_drop([self._reward])

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the limited rewards."""
        low = -np.inf if self.low is None else self.low
        high = np.inf if self.high is None else self.high
        return [
            DROPPED if reward.is_dropped else min(max(reward.value, low), high)
            for reward in score_rows(self._reward, prompts, preds, dones)
        ]


@dataclass
class Scale(BatchReward):
    """A reward times a factor; its parts keep their names.

    Args:
        reward: The reward.
        factor: The factor, which may be negative.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> Scale("repetition", 2.0)(Prompt("a"), Preds(CharTokenizer("a "), [1, 2, 1, 2, 1, 2, 1]), True)
        -1.0
    """

    reward: RewardLike
    factor: float

    def __post_init__(self) -> None:
        self._reward = read_reward(self.reward)
        self.score_at = _when([self._reward])
        self.may_drop = _may_drop([self._reward])

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the scaled rewards."""
        return [
            DROPPED
            if reward.is_dropped
            else {name: self.factor * part for name, part in reward.parts.items()} or self.factor * reward.value
            for reward in score_rows(self._reward, prompts, preds, dones)
        ]


@dataclass
class Gate(BatchReward):
    """A reward that is asked only where a condition holds, as a judge of answers where the format is right.

    Args:
        condition: A reward: the gate is open where it is above `threshold`. If it is about finished texts, so is all.
        reward: What is earned where it is open; closed rows are not given to it.
        otherwise: What is earned where it is closed.
        threshold: The bound of the condition.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> gate = Gate({"name": "regex", "pattern": "a+"}, {"name": "length", "target": 2}, otherwise=-1.0)
        >>> [gate(Prompt("a"), Preds(CharTokenizer("ab"), ids), True) for ids in ([1, 1], [1, 2])]
        [1.0, -1.0]
    """

    condition: RewardLike
    reward: RewardLike
    otherwise: float = 0.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        self._condition, self._reward = read_reward(self.condition), read_reward(self.reward)
        opens, pays = _when([self._condition]), _when([self._reward])
        # A condition of finished texts says nothing of the others: they are neither let through nor charged.
        self.score_at = opens if opens != "step" and pays == "step" else _when([self._condition, self._reward])
        self.may_drop = _may_drop([self._condition, self._reward])

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the gated rewards."""
        verdicts = score_rows(self._condition, prompts, preds, dones)
        opened = [not verdict.is_dropped and verdict.value > self.threshold for verdict in verdicts]
        rows = [row for row, is_open in enumerate(opened) if is_open]
        scores: list[Score] = [DROPPED if verdict.is_dropped else self.otherwise for verdict in verdicts]
        earned = score_rows(self._reward, *_rows(rows, prompts, preds, dones))
        for row, reward in zip(rows, earned, strict=True):
            scores[row] = reward.score
        return scores


@dataclass
class Ensemble(BatchReward):
    """Several judges of one thing as one reward: their mean, or the strictest of them.

    The minimum resists a policy that has found the weakness of one judge (Coste et al. 2023, Reward Model Ensembles
    Help Mitigate Overoptimization, section 4: worst-case optimisation).

    Args:
        rewards: The judges; they should speak in the same units.
        by: "mean" or "minimum".

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> judges = [{"name": "length", "target": 2}, {"name": "length", "target": 4}]
        >>> [Ensemble(judges, by)(Prompt("a"), Preds(CharTokenizer("a"), [1, 1]), True) for by in ("mean", "minimum")]
        [0.75, 0.5]
    """

    rewards: Sequence[RewardLike]
    by: Literal["mean", "minimum"] = "mean"

    def __post_init__(self) -> None:
        check_choice("by", self.by, ("mean", "minimum"))
        if not self.rewards:
            raise ValueError("Expected at least one of `rewards`, got none.")
        self._rewards = [read_reward(reward) for reward in self.rewards]
        self.score_at = _when(self._rewards)
        self.may_drop = _may_drop(self._rewards)

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the joint rewards."""
        judged = [score_rows(judge, prompts, preds, dones) for judge in self._rewards]
        values = np.array([[one.value for one in verdicts] for verdicts in judged])  # (judges, B)
        scores = (values.mean(0) if self.by == "mean" else values.min(0)).tolist()
        return [
            DROPPED if any(verdicts[row].is_dropped for verdicts in judged) else score
            for row, score in enumerate(scores)
        ]


@dataclass
class Cached(BatchReward):
    """A reward that is asked once for each prompt and text, and remembered.

    For a reward that depends on the prompt's row and the text alone: not on token ids, the end reason, `preds.state`,
    nor the other rows. Equal texts of one call are asked once, too. Rows that are not done, or that were dropped, are
    not remembered.

    Args:
        reward: The reward.
        size: How many answers are kept; the one that was used longest ago goes first.

    Attributes:
        n_asked: How many rows the reward was given.

    Example:
        >>> from textenv import CharTokenizer, Preds, Prompt
        >>> reward, preds = Cached("vader"), Preds(CharTokenizer(), CharTokenizer().encode("good"))
        >>> reward.score([Prompt("a")] * 3, [preds] * 3, [True] * 3) == [0.4404] * 3, reward.n_asked
        (True, 1)
    """

    reward: RewardLike
    size: int = 10_000

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Expected `size` to be at least 1, got {self.size}.")
        self._reward = read_reward(self.reward)
        self.score_at = _when([self._reward])
        self.may_drop = _may_drop([self._reward])
        self.n_asked = 0
        self._known: OrderedDict[tuple[str, str, str], Reward] = OrderedDict()

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the rewards, new or remembered."""
        keys: list[Any] = [
            (str(prompt), repr(prompt.row), one.text) if done else row
            for row, (prompt, one, done) in enumerate(zip(prompts, preds, dones, strict=True))
        ]
        answers = {key: self._known[key] for key in keys if key in self._known}
        asked = {key: row for row, key in enumerate(keys) if key not in answers}
        rows = list(asked.values())
        self.n_asked += len(rows)
        fresh = score_rows(self._reward, *_rows(rows, prompts, preds, dones))
        answers.update(zip(asked, fresh, strict=True))
        for key in keys:
            if not isinstance(key, int) and not answers[key].is_dropped:
                self._known[key] = answers[key]
                self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return [answers[key].score for key in keys]


def _rows(rows: Sequence[int], *columns: Sequence[Any]) -> tuple[list[Prompt], list[Preds], list[bool]]:
    prompts, preds, dones = ([column[row] for row in rows] for column in columns)
    return prompts, preds, dones
