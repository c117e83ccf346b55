"""What a game of turns is: the protocol that each adapter writes, and what comes of a turn."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable


class GameError(RuntimeError):
    """A game raised, broke the protocol, or does not play the same again from its seed; the message says which."""


class Outcome(NamedTuple):
    """What a turn has led to.

    Attributes:
        text: What the policy sees of it.
        reward: What the turn has earned.
        terminated: Whether the game is over. It wins over `truncated`.
        truncated: Whether the game was broken off.
        info: Whatever the game says besides.
    """

    text: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@runtime_checkable
class Game(Protocol):
    """A text environment in which an action is a whole turn.

    From the same seed the same turns must lead to the same texts and rewards, in another process too: the generators of
    Python's `random` and of NumPy's global functions are seeded for each game and kept apart from all others, so a game
    may draw from them. What else is random must follow from `seed`.

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
        """Begin the game of this seed; return the text that the policy goes on from, and an info."""

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play a turn; return what `Outcome` has: text, reward, terminated, truncated, info."""
