"""The parts of an agent that a recipe's settings ask for: arguments of policy and buffer, and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from textenv.checks.trust import Trust

from .configuration.config import Named
from .configuration.recipes import RECIPES
from .policies.surrogate_names import make_surrogate
from .steps.critic_warmup import CriticWarmup
from .steps.kl_penalty import KLPenalty
from .steps.sample_groups import SampleGroups
from .steps.step import RolloutStep


@dataclass
class RecipeParts:
    """The arguments and steps of a recipe.

    Args:
        samples_per_prompt: The number of samples of each prompt that the environment should have; 1 for any.
        policy: Arguments of `LMPolicy`.
        buffer: Arguments of `SequenceRolloutBuffer`.
        steps: Steps to attach to the buffer, besides those that the environment needs.
    """

    samples_per_prompt: int = 1
    policy: dict[str, Any] = field(default_factory=dict)
    buffer: dict[str, Any] = field(default_factory=dict)
    steps: list[RolloutStep] = field(default_factory=list)


def recipe_parts(name: str | None) -> RecipeParts:
    """Return the parts of a recipe; None has no parts.

    Raises:
        ValueError: If there is no recipe of that name.

    Example:
        >>> recipe_parts("rloo").buffer
        {'advantage': 'rloo', 'aggregation': 'constant'}
    """
    if name is None:
        return RecipeParts()
    if name not in RECIPES:
        raise ValueError(f"Expected `recipe` to be one of {', '.join(RECIPES)}, got {name!r}.")
    settings, parts = dict(RECIPES[name]), RecipeParts()
    parts.samples_per_prompt = settings.pop("env.args.samples_per_prompt", 1)
    if surrogate := settings.pop("algorithm.surrogate", None):
        parts.policy["surrogate"] = make_surrogate(Named(**surrogate), Trust())
    penalty = {key.removeprefix("kl."): settings.pop(key) for key in list(settings) if key.startswith("kl.")}
    if penalty["coef"]:
        parts.steps.append(KLPenalty(**penalty))
    if min_groups := settings.pop("algorithm.min_groups", None):
        parts.steps.append(SampleGroups(min_groups))
    if n_rollouts := settings.pop("algorithm.critic_warmup", 0):
        parts.steps.append(CriticWarmup(n_rollouts))
    parts.buffer = {key.removeprefix("algorithm."): value for key, value in settings.items()}
    return parts
