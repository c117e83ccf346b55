"""What becomes of rows whose reward fails: raised, left out and counted, or given a penalty; too many stop the run."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from textenv.completion import Preds
from textenv.prompts import Prompt
from textenv.rewarding import DROPPED, FAILURE, RewardError, Score, describe

OnFailure = Literal["raise", "drop"] | float
MOST_DROPPED = 0.05  # the share of rows that may be left out for a reward that failed
WINDOW = 1000  # rows that this share is of, the latest
FEWEST = 100  # of fewer than this nothing is concluded: they count as so many


class RowError(Exception):
    """Why a row has no score; `AsyncReward.score_row` raises it to say whether asking again may help.

    Args:
        message: The cause.
        again: Whether the row is worth another attempt.
        wait: The least seconds to wait before it.
    """

    def __init__(self, message: str, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.wait = again, wait


class Failures:
    """Decides over rows whose reward failed, and counts them.

    Args:
        on_failure: "raise": `RewardError`, which lists all that have failed. "drop": the episode is left out of
            training; more than 5 % of the last 1000 rows (of the first 100, more than 5) are a `RewardError`. A number:
            that is the reward, as the part "failure". Dropped and penalised rows are warned of once and counted.

    Attributes:
        n_failed: How many rows have failed so far.

    Raises:
        ValueError: If it is none of these.

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
        """What a failed row gets in place of a score."""
        return {FAILURE: float(self.on_failure)} if _is_number(self.on_failure) else DROPPED

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        recent = "".join("1" if failed else "0" for failed in self._recent)
        return {"n_failed": self.n_failed, "has_warned": self._has_warned, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.n_failed, self._has_warned = state["n_failed"], state["has_warned"]
        self._recent = deque((failed == "1" for failed in state["recent"]), maxlen=WINDOW)

    def note(
        self, who: str, causes: Mapping[int, Exception], prompts: Sequence[Prompt], preds: Sequence[Preds], tried: str
    ) -> None:
        """Raise, or warn of the first rows that fail.

        Args:
            who: What has no score of them.
            causes: Why, by row.
            prompts: The prompts of all rows of the call.
            preds: Their completions.
            tried: What was done for each, as ", each asked 3 times at most".

        Raises:
            RewardError: With "raise": each of the failed rows with its cause.
        """
        self.n_failed += len(causes)
        rows = [f"{describe(prompts[row], preds[row])}: {_cause(error)}" for row, error in causes.items()]
        how_many = f"{who} has no score of {len(causes)} of {len(prompts)} rows"
        if self.on_failure == "raise":
            raise RewardError("\n- ".join([f"{how_many}{tried}:", *rows])) from next(iter(causes.values()))
        if not self._has_warned:
            self._has_warned = True
            what = "are dropped" if self.on_failure == "drop" else f"earn {self.on_failure:g}"
            warnings.warn(
                f"{how_many}; such rows {what}. The first: {rows[0]}. Not said again; see n_failed.", stacklevel=4
            )

    def count(self, n_rows: int, n_failed: int) -> None:
        """Take in how many finished rows were asked for, and how many of them failed.

        Raises:
            RewardError: With "drop", if too many have.
        """
        if self.on_failure != "drop":
            return
        self._recent.extend([True] * n_failed + [False] * (n_rows - n_failed))
        failed = sum(self._recent)
        if failed > MOST_DROPPED * max(len(self._recent), FEWEST):
            raise RewardError(
                f"Expected a reward that fails for at most {MOST_DROPPED:.0%} of the episodes, got {failed} of the "
                f"last {len(self._recent)}: what is left to train on is no fair sample. Let it raise to see the causes "
                "(on_failure='raise'), or give failed episodes a number (on_failure=0.0)."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, (RowError, RewardError)) else f"{type(error).__name__}: {error}"
