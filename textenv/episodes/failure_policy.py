"""The policy for rows whose reward fails: raise, leave them out, or give them a penalty."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from textenv.episodes.completion import Preds
from textenv.episodes.scores import DROPPED, FAILURE, RewardError, Score, describe
from textenv.prompts.prompts import Prompt

OnFailure = Literal["raise", "drop"] | float
MOST_DROPPED = 0.05  # the largest share of rows that may be left out: the rest is still a fair sample
WINDOW = 1000  # the number of rows, the latest ones, over which the share is taken
FEWEST = 100  # the share is taken over at least this many rows, so that an early failure does not stop a run


class RowError(Exception):
    """The error of a row that gets no score; `AsyncReward.score_row` raises it to say whether another attempt may help.

    Args:
        message: The reason why there is no score.
        again: Whether another attempt may help.
        wait: The least time before that attempt, in seconds.
    """

    def __init__(self, message: str, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.wait = again, wait


class Failures:
    """The failure policy of one reward, with a count of the rows that have failed.

    Args:
        on_failure: "raise": a `RewardError` lists the failed rows. "drop": their episodes are left out of training; a
            `RewardError` is raised once they are more than 5 % of the last 1000 rows (among the first 100 rows: more
            than 5). A number: the reward of a failed row, as the part "failure". With "drop" or a number, the first
            failure is a warning.

    Attributes:
        n_failed: The number of rows that have failed so far.

    Raises:
        ValueError: If `on_failure` is none of these.

    Example:
        >>> Failures(-1.0).instead
        {'failure': -1.0}
    """

    def __init__(self, on_failure: OnFailure) -> None:
        if on_failure not in ("raise", "drop") and not _is_number(on_failure):
            raise ValueError(f"Expected `on_failure` to be 'raise', 'drop' or a number, got {on_failure!r}.")
        self.on_failure = on_failure
        self.n_failed = 0
        self._has_warned = False
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    @property
    def instead(self) -> Score:
        """The score of a failed row."""
        return {FAILURE: float(self.on_failure)} if _is_number(self.on_failure) else DROPPED

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, ready for JSON."""
        recent = "".join("1" if failed else "0" for failed in self._recent)
        return {"n_failed": self.n_failed, "has_warned": self._has_warned, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.n_failed, self._has_warned = state["n_failed"], state["has_warned"]
        self._recent = deque((failed == "1" for failed in state["recent"]), maxlen=WINDOW)

    def note(
        self, who: str, causes: Mapping[int, Exception], prompts: Sequence[Prompt], preds: Sequence[Preds], tried: str
    ) -> None:
        """Raise an error for rows that have failed, or warn of the first one.

        Args:
            who: The subject of the message, such as "The reward".
            causes: The error of each failed row, by its number.
            prompts: The prompts of all rows of the call.
            preds: Their completions.
            tried: The end of the message's first line, such as ", each asked 3 times at most".

        Raises:
            RewardError: With "raise"; the message lists the failed rows and their causes.
        """
        self.n_failed += len(causes)
        descriptions = [f"{describe(prompts[row], preds[row])}: {_cause(error)}" for row, error in causes.items()]
        summary = f"{who} has no score of {len(causes)} of {len(prompts)} rows"
        if self.on_failure == "raise":
            raise RewardError("\n- ".join([f"{summary}{tried}:", *descriptions])) from next(iter(causes.values()))
        if not self._has_warned:
            self._has_warned = True
            consequence = "are dropped" if self.on_failure == "drop" else f"earn {self.on_failure:g}"
            warnings.warn(
                f"{summary}; such rows {consequence}. The first: {descriptions[0]}. Later failures are only counted, "
                "in `n_failed`.",
                stacklevel=4,
            )

    def count(self, n_rows: int, n_failed: int) -> None:
        """Count finished rows.

        Args:
            n_rows: The number of rows that were scored, failed ones included.
            n_failed: The number of rows that failed.

        Raises:
            RewardError: With "drop", if more than 5 % of the latest rows have failed.
        """
        if self.on_failure != "drop":
            return
        # The order within a call does not matter, except at the border of the window.
        self._recent.extend([True] * n_failed + [False] * (n_rows - n_failed))
        failed = sum(self._recent)
        if failed > MOST_DROPPED * max(len(self._recent), FEWEST):
            raise RewardError(
                f"Expected a reward that fails for at most {MOST_DROPPED:.0%} of the episodes, got {failed} of the "
                f"last {len(self._recent)}: what is left to train on is no fair sample. Let it raise to see the causes "
                "(on_failure='raise'), or give failed episodes a number (on_failure=0.0)."
            )


def _is_number(value: Any) -> bool:
    # bool is excluded: True is an int in Python, but as a reward surely a mistake.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, (RowError, RewardError)) else f"{type(error).__name__}: {error}"
