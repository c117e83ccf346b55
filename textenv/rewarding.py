"""From what a reward hook returns to checked numbers: one batched contract, and errors that name the row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, Protocol

from textenv.completion import Preds
from textenv.prompts import Prompt

ScoreAt = Literal["step", "done", "rollout_end"]
FAILURE = "failure"  # the reward part of a row that got a penalty in place of a score
LARGEST = 1e15  # of a reward: gradients of values have its size, and their norm sums squares in float32, up to 3e38
# What the code of a reward may raise that is its failure; Ctrl-C is none, while sys.exit is no way to end a run.
RAISED = (Exception, SystemExit)


class Dropped(Enum):
    """The type of `DROPPED`, which stays one object when it is copied or pickled."""

    DROPPED = "dropped"

    def __repr__(self) -> str:
        """Return the name that one imports."""
        return self.name


# What a reward returns for a finished row that has no score: none of the episode's tokens is trained on, and no mean
# has it. It is no None, which a function without `return` gives. Who cannot leave an episode out raises `RewardError`.
DROPPED: Final = Dropped.DROPPED

Score = float | Mapping[str, float] | Dropped


class RewardError(ValueError):
    """A reward hook raised, or returned something that is no finite number; the message names lane and prompt."""


class RewardFunction(Protocol):
    """A reward given as a function; `TextEnv.get_reward` has the same contract."""

    def __call__(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return the reward of the token just written, or its named parts; `DROPPED` leaves the episode out."""


class Reward(NamedTuple):
    """A checked reward: its value, and the named parts that sum to it (empty for a bare number).

    With `is_dropped` the row has none: the value is 0. With `has_failed` it stands for the one that the hook failed to
    give (`on_failure`).
    """

    value: float
    parts: dict[str, float]
    is_dropped: bool = False
    has_failed: bool = False

    @property
    def score(self) -> Score:
        """What a reward returns for it."""
        return DROPPED if self.is_dropped else self.parts or self.value


def describe(prompt: Prompt, preds: Preds) -> str:
    """Name a row in an error message."""
    return f"lane {preds.lane}, prompt {str(prompt)[:80]!r}, text {preds.text[:80]!r}"


def score_each(
    reward: RewardFunction,
    prompts: Sequence[Prompt],
    preds: Sequence[Preds],
    dones: Sequence[bool],
    name: str = "the reward",
) -> list[Score]:
    """Return what a function makes of each row.

    Raises:
        RewardError: If it raises; the message has its name and the row.
    """
    rewards = []
    for prompt, completion, done in zip(prompts, preds, dones, strict=True):
        try:
            rewards.append(reward(prompt, completion, done))
        except RAISED as error:
            where = describe(prompt, completion)
            raise RewardError(f"{name} raised {type(error).__name__}: {error} ({where}).") from error
    return rewards


def check_rewards(values: Any, prompts: Sequence[Prompt], preds: Sequence[Preds]) -> list[Reward]:
    """Return the rewards of a batch, checked.

    Args:
        values: What `get_rewards` returned: a sequence of numbers, dicts of named numbers or `DROPPED`, one a row.
        prompts: The prompts of the rows.
        preds: The completions of the rows.

    Raises:
        RewardError: If the length differs or a value, or the sum of its parts, is no finite real number up to 1e15.
    """
    check_length(values, len(prompts))
    return [check_reward(*row) for row in zip(values, prompts, preds, strict=True)]


def check_length(values: Any, n_rows: int) -> None:
    """Raise RewardError where values are no sequence of one reward a row."""
    try:
        length = None if isinstance(values, (str, Mapping)) else len(values)
    except TypeError:
        length = None
    if length is None:
        raise RewardError(f"Expected `get_rewards` to return a sequence of {n_rows} rewards, got {values!r:.80}.")
    if length != n_rows:
        raise RewardError(f"Expected `get_rewards` to return {n_rows} rewards, one a row, got {length}.")


def check_reward(value: Any, prompt: Prompt, preds: Preds) -> Reward:
    """Return the reward of one row, checked; see `check_rewards`."""
    if value is DROPPED:
        return Reward(0.0, {}, is_dropped=True)
    if isinstance(value, Mapping):
        parts = {str(name): _number(part, f"the reward part {name!r}", prompt, preds) for name, part in value.items()}
        return Reward(_number(math.fsum(parts.values()), "the sum of a reward's parts", prompt, preds), parts)
    return Reward(_number(value, "a reward", prompt, preds), {})


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except Exception:  # also of a value of any library: a tensor of no dimensions
        return None


def _number(value: Any, what: str, prompt: Prompt, preds: Preds) -> float:
    is_none = isinstance(value, (str, bytes, complex)) or "complex" in str(getattr(value, "dtype", ""))
    try:
        number = math.nan if is_none else float(value)
    except Exception:  # a value of any library: a tensor without data, a column of a table
        number = math.nan
    if not math.isfinite(number):
        # TextRL's rewards return a list of one.
        is_one = not isinstance(value, (str, bytes, Mapping)) and _length(value) == 1
        cure = ": return the number itself, not a list of one" if is_one else ""
        where = describe(prompt, preds)
        raise RewardError(f"Expected {what} to be a finite number, got {value!r:.80}{cure} ({where}).")
    if abs(number) > LARGEST:
        raise RewardError(
            f"Expected {what} to be at most {LARGEST:g} in size, whose square float32 can hold, got {value!r:.80} "
            f"({describe(prompt, preds)})."
        )
    return number
