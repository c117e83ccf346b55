"""The protocol of a game of turns, which each adapter implements, and the outcome of a turn."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable


class GameError(RuntimeError):
    """A game raised an error, broke the protocol, or played differently from the same seed; the message tells which."""


class Outcome(NamedTuple):
    """The result of a turn.

    Attributes:
        text: The reply that the policy observes.
        reward: The turn's reward.
        terminated: Whether the game is over; if so, `truncated` does not matter.
        truncated: Whether the game was broken off.
        info: Anything else that the game reports.
    """

    text: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@runtime_checkable
class Game(Protocol):
    """A text environment in which an action is a whole turn.

    The same seed and turns must lead to the same texts and rewards, in another process too. A game may draw from
    Python's `random` and NumPy's global functions: their state is seeded for each game and kept apart from all others.
    Any other randomness must follow from `seed`.

    Example:
        >>> class Echo:
        ...     def reset(self, *, seed):
        ...         return "say something", {}
        ...     def step(self, text):
        ...         return "", float(len(text)), True, False, {}
        >>> isinstance(Echo(), Game)
        True
    """

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin the game of this seed; return its opening, to which the policy replies, and an info."""

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play a turn; return the fields of `Outcome`: text, reward, terminated, truncated, info."""
