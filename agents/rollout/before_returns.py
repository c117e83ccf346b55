"""The interface of the steps that work on a complete rollout before returns are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class BeforeReturns(Protocol):
    """A step that a `SequenceRolloutBuffer` runs before it computes returns: see `RolloutStep`."""

    @property
    def key(self) -> str:
        """The step's name in saved models and checkpoints."""

    @property
    def order(self) -> int:
        """The position of the step among the others: steps of lower order run first."""

    def follow_env(self) -> bool:
        """Prepare the step anew if its model has another env than before; return whether it has."""

    def begin(self) -> None:
        """Prepare for a rollout that begins."""

    def __call__(self, buffer: Any) -> None:
        """Change `rewards` or `penalties` of a `SequenceRolloutBuffer`, (T, B), in place."""


def missing_steps(expected: Sequence[str], attached: Sequence[BeforeReturns]) -> list[str]:
    """Return the keys of the steps that a model was trained with and that are not attached to it.

    Args:
        expected: The keys of the steps that it was trained with.
        attached: Its steps.
    """
    keys = {step.key for step in attached}
    return [key for key in expected if key not in keys]
