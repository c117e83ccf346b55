"""Rewards: the contract of reward functions, and the checks of the values that they return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, Protocol

from textenv.episodes.completion import Preds
from textenv.prompts.prompts import Prompt

ScoreAt = Literal["step", "done", "rollout_end"]
FAILURE = "failure"  # the reward part of a row that got a penalty in place of a score
# The largest reward. A critic's gradient is about as large, and the gradient norm sums its squares in float32, whose
# largest number is 3e38.
LARGEST = 1e15
# Exceptions that count as a failure of the reward. KeyboardInterrupt does not; sys.exit within a reward does.
RAISED = (Exception, SystemExit)


class Dropped(Enum):
    """The type of `DROPPED`, which stays one object when it is copied or pickled."""

    DROPPED = "dropped"

    def __repr__(self) -> str:
        """Return the name under which it is imported."""
        return self.name


# The value that a reward returns for a finished row without a score: the episode is not trained on and counts in no
# mean. None would not do, since a function that forgets its `return` returns None. Callers that cannot leave an episode
# out raise `RewardError`.
DROPPED: Final = Dropped.DROPPED

Score = float | Mapping[str, float] | Dropped


class RewardError(ValueError):
    """A reward raised, or returned something other than a finite number; the message names lane and prompt."""


class RewardFunction(Protocol):
    """A reward given as a function; `TextEnv.get_reward` has the same contract."""

    def __call__(self, prompt: Prompt, preds: Preds, done: bool) -> Score:
        """Return the reward of the token just written, or its named parts; `DROPPED` leaves the episode out.

        Args:
            prompt: The prompt, a str.
            preds: The completion so far.
            done: Whether the episode is over.
        """


class Reward(NamedTuple):
    """A checked reward.

    Attributes:
        value: The number.
        parts: The named parts, of which `value` is the sum; empty for a bare number.
        is_dropped: Whether the row has no reward and is left out; `value` is then 0.
        has_failed: Whether the reward failed, so that `value` is the number that `on_failure` gives such rows.
    """

    value: float
    parts: dict[str, float]
    is_dropped: bool = False
    has_failed: bool = False

    @property
    def score(self) -> Score:
        """The reward in the form in which a reward function returns it: `DROPPED`, named parts or a number."""
        return DROPPED if self.is_dropped else self.parts or self.value


def describe(prompt: Prompt, preds: Preds) -> str:
    """Return lane, prompt and completion of a row, for an error message."""
    return f"lane {preds.lane}, prompt {str(prompt)[:80]!r}, text {preds.text[:80]!r}"


def score_each(
    reward: RewardFunction,
    prompts: Sequence[Prompt],
    preds: Sequence[Preds],
    dones: Sequence[bool],
    name: str = "the reward",
) -> list[Score]:
    """Return the rewards of rows from a function that is called once for each row.

    Args:
        reward: The function.
        prompts: The prompts of the rows.
        preds: Their completions.
        dones: Whether the episode of each row is over.
        name: The function as errors name it.

    Raises:
        RewardError: If the function raises; the message names it and the row.
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
        values: The result of `get_rewards`: for each row a number, a dict of named numbers or `DROPPED`.
        prompts: The prompts of the rows.
        preds: The completions of the rows.

    Raises:
        RewardError: If there is not one value for each row, or a value, or the sum of its parts, is no finite real
            number up to 1e15 in size.

    Example:
        >>> from textenv import CharTokenizer
        >>> check_rewards([{"length": 2.0, "rhyme": 1.0}], [Prompt("a")], [Preds(CharTokenizer("ab"), [1, 2])])
        [Reward(value=3.0, parts={'length': 2.0, 'rhyme': 1.0}, is_dropped=False, has_failed=False)]
    """
    check_length(values, len(prompts))
    return [check_reward(*row) for row in zip(values, prompts, preds, strict=True)]


def check_length(values: Any, n_rows: int) -> None:
    """Raise RewardError unless `values` is a sequence of one reward a row."""
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
    except Exception:  # `value` may be an object of any library, such as a tensor without dimensions
        return None


def _number(value: Any, label: str, prompt: Prompt, preds: Preds) -> float:
    # float() would read "1.5", and drop the imaginary part of a complex numpy scalar.
    is_no_number = isinstance(value, (str, bytes, complex)) or "complex" in str(getattr(value, "dtype", ""))
    try:
        number = math.nan if is_no_number else float(value)
    except Exception:  # `value` may be an object of any library, such as a tensor without data
        number = math.nan
    if not math.isfinite(number):
        # Rewards written for TextRL return a list of one number, so the message has a cure for this.
        is_list_of_one = not isinstance(value, (str, bytes, Mapping)) and _length(value) == 1
        cure = ": return the number itself, not a list of one" if is_list_of_one else ""
        where = describe(prompt, preds)
        raise RewardError(f"Expected {label} to be a finite number, got {value!r:.80}{cure} ({where}).")
    if abs(number) > LARGEST:
        raise RewardError(
            f"Expected {label} to be at most {LARGEST:g} in size, whose square float32 can hold, got {value!r:.80} "
            f"({describe(prompt, preds)})."
        )
    return number
