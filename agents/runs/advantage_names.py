"""The estimate of advantages that a run's configuration names."""

from __future__ import annotations

from typing import cast, get_args

from textenv.checks.trust import Kind, Trust, is_called_with

from ..configuration.config import Named
from ..configuration.names import build
from ..rollout.advantages import Advantage, AdvantageFunction

NAMES = get_args(Advantage)
ADVANTAGE = Kind("way to estimate advantages", "a class with __call__(self, episodes)", is_called_with("episodes"))


def make_advantage(named: Named | str, trust: Trust) -> Advantage | AdvantageFunction:
    """Return a name that the buffer knows, or build the function of a class.

    Args:
        named: One of `NAMES`, or "module:Class", with or without arguments.
        trust: The permissions of the command line.

    Raises:
        CommandError: If the name is unknown, its class may not be imported, or it does not take the arguments.

    Example:
        >>> from textenv.checks.trust import Trust
        >>> make_advantage("reinforce++", Trust())
        'reinforce++'
    """
    if named in NAMES:
        return cast("Advantage", named)
    return cast("AdvantageFunction", build(named, dict.fromkeys(NAMES, "no class"), ADVANTAGE, trust))
