"""Rewards made of other rewards: sums, limits, factors, conditions, ensembles and a cache.

Where one of the inner rewards drops a row, the outer reward drops it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from textenv.episodes.completion import Preds
from textenv.episodes.scores import DROPPED, Reward, RewardFunction, Score, ScoreAt
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward, RewardLike, check_choice, score_rows
from textenv.rewards.registry import read_reward

Scores = Sequence[Score]


def _may_drop(rewards: Sequence[RewardFunction]) -> bool:
    return any(isinstance(reward, BatchReward) and reward.may_drop for reward in rewards)


def _when(rewards: Sequence[RewardFunction]) -> ScoreAt:
    """Return the `score_at` of the outer reward: "step" if an inner one scores every token, as a function does."""
    wanted = {reward.score_at if isinstance(reward, BatchReward) else "step" for reward in rewards}
    return "step" if "step" in wanted else "rollout_end" if "rollout_end" in wanted else "done"


@dataclass
class WeightedSum(BatchReward):
    """The weighted sum of several rewards, each of which is logged under its name.

    A function is called for every token; a `BatchReward` of finished texts is called for finished texts only, even
    beside a function. The parts of a reward that has parts itself are named "name/part".

    Args:
        parts: The rewards by name: functions, `BatchReward`s, registered names, or mappings of name and options.
        weights: The factors by name; 1 for the others.

    Raises:
        ValueError: If there are no parts, or a weight has a name that no part has.

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
        self._rewards = {name: read_reward(reward) for name, reward in self.parts.items()}
        self.score_at = _when(list(self._rewards.values()))
        self.may_drop = _may_drop(list(self._rewards.values()))

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the named parts of each row."""
        rows: list[dict[str, float]] = [{} for _ in prompts]
        dropped: set[int] = set()
        for name, reward in self._rewards.items():
            weight = self.weights.get(name, 1.0)
            for row, earned in enumerate(score_rows(reward, prompts, preds, dones)):
                # A bare number has no parts: it is logged under the name itself.
                named = {f"{name}/{inner}": value for inner, value in earned.parts.items()} or {name: earned.value}
                rows[row].update({key: weight * value for key, value in named.items()})
                dropped.update([row] if earned.is_dropped else [])
        return [DROPPED if row in dropped else parts for row, parts in enumerate(rows)]


@dataclass
class Clip(BatchReward):
    """A reward clipped to [low, high]; its parts are summed first and no longer logged.

    Args:
        reward: The reward to clip.
        low: The lower limit; None for none.
        high: The upper limit; None for none.

    Raises:
        ValueError: If `low` is above `high`.

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
        """Return the clipped rewards."""
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
        reward: The reward to scale.
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
    """A reward that is called only for the rows that meet a condition, such as a judge of answers in the right format.

    Args:
        condition: The reward whose score decides: a row meets the condition if its score is above `threshold`. If the
            condition scores finished texts only, so does the gate.
        reward: The reward of the rows that meet the condition; it never sees the others.
        otherwise: The reward of the other rows.
        threshold: The bound on the condition's score.

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
        condition_at, both_at = _when([self._condition]), _when([self._condition, self._reward])
        # A condition on finished texts has no score for the tokens before the end, which then earn nothing either way.
        self.score_at = condition_at if condition_at != "step" and both_at == "step" else both_at
        self.may_drop = _may_drop([self._condition, self._reward])

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Scores:
        """Return the gated rewards."""
        verdicts = score_rows(self._condition, prompts, preds, dones)
        opened = [not verdict.is_dropped and verdict.value > self.threshold for verdict in verdicts]
        rows = [row for row, is_open in enumerate(opened) if is_open]  # the only rows for which the reward is called
        scores: list[Score] = [DROPPED if verdict.is_dropped else self.otherwise for verdict in verdicts]
        earned = score_rows(self._reward, *_rows(rows, prompts, preds, dones))
        for row, reward in zip(rows, earned, strict=True):
            scores[row] = reward.score
        return scores


@dataclass
class Ensemble(BatchReward):
    """The mean or the minimum of several rewards for the same quality.

    The minimum resists a policy that exploits the weakness of a single reward (Coste et al., 2023, Reward Model
    Ensembles Help Mitigate Overoptimization, section 4: worst-case optimisation).

    Args:
        rewards: The rewards, in the same units.
        by: "mean" or "minimum".

    Raises:
        ValueError: If there are no rewards, or `by` is neither.

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
        """Return the mean or minimum of each row."""
        earned = [score_rows(reward, prompts, preds, dones) for reward in self._rewards]
        values = np.array([[reward.value for reward in rewards] for rewards in earned])  # (rewards, B)
        scores = (values.mean(0) if self.by == "mean" else values.min(0)).tolist()  # (B,)
        return [
            DROPPED if any(rewards[row].is_dropped for rewards in earned) else score for row, score in enumerate(scores)
        ]


@dataclass
class Cached(BatchReward):
    """A cache in front of a reward: each pair of prompt and finished text is scored once.

    The cache suits rewards that depend on the prompt, its row and the text only, and not on token ids, the end reason,
    `preds.state` or the other rows. Equal texts within a call are scored once, too. Unfinished and dropped rows are not
    cached.

    Args:
        reward: The reward behind the cache.
        size: The most scores that are kept; the least recently used one is removed first.

    Attributes:
        n_asked: The number of rows that the reward itself has scored.

    Raises:
        ValueError: If `size` is below 1.

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
        """Return the rewards, new or cached."""
        keys: list[Any] = [
            # `repr`, since a row is a dict, which has no hash.
            (str(prompt), repr(prompt.row), completion.text) if done else row  # an unfinished row matches no other
            for row, (prompt, completion, done) in enumerate(zip(prompts, preds, dones, strict=True))
        ]
        rewards = {key: self._known[key] for key in keys if key in self._known}
        asked = {key: row for row, key in enumerate(keys) if key not in rewards}  # of several equal rows, the last one
        rows = list(asked.values())
        self.n_asked += len(rows)
        fresh = score_rows(self._reward, *_rows(rows, prompts, preds, dones))
        rewards.update(zip(asked, fresh, strict=True))
        for key in keys:
            if not isinstance(key, int) and not rewards[key].is_dropped:
                self._known[key] = rewards[key]
                self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return [rewards[key].score for key in keys]


def _rows(rows: Sequence[int], *columns: Sequence[Any]) -> tuple[list[Prompt], list[Preds], list[bool]]:
    """Return prompts, completions and dones of the chosen rows."""
    prompts, preds, dones = ([column[row] for row in rows] for column in columns)
    return prompts, preds, dones
