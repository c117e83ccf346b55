"""The surrogate that a run's configuration names."""

from __future__ import annotations

from textenv.checks.trust import Kind, Trust, is_called_with

from ..configuration.config import Named
from ..configuration.names import build
from .surrogates import SURROGATES, SurrogateFunction

SURROGATE = Kind("surrogate", "a class with __call__(self, terms)", is_called_with("terms"))


def make_surrogate(named: Named | str | None, trust: Trust) -> SurrogateFunction | None:
    """Build a surrogate, whose bounds are its arguments; None leaves the loss to the algorithm.

    Args:
        named: A name of `SURROGATES` or "module:Class", with or without arguments.
        trust: The permissions of the command line.

    Raises:
        CommandError: If the name is unknown, its class may not be imported, or it does not take the arguments.

    Example:
        >>> from textenv.checks.trust import Trust
        >>> make_surrogate(Named("clip_higher", {"high": 0.3}), Trust())
        ClipHigher(low=0.2, high=0.3)
    """
    return None if named is None else build(named, SURROGATES, SURROGATE, trust)
