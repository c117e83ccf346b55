"""The steps of a configuration between scores and advantages: what is shaped, what is left out, what waits."""

from __future__ import annotations

from ..configuration.config import ShapingConfig, TrainConfig
from ..steps.reward_shaping import RewardShaping
from ..steps.sample_groups import SampleGroups
from ..steps.scores import DropEpisodes
from ..steps.step import RolloutStep


def score_steps(config: TrainConfig) -> list[RolloutStep]:
    """Return the steps that a configuration asks for, besides those that `make_agent` attaches.

    Example:
        >>> from agents.configuration.config import ShapingConfig, TrainConfig
        >>> [type(step).__name__ for step in score_steps(TrainConfig(shaping=ShapingConfig(clip=5.0, drop_cut=True)))]
        ['RewardShaping', 'DropEpisodes']
    """
    steps: list[RolloutStep] = []
    operations = dict(vars(config.shaping))
    drop_cut = operations.pop("drop_cut")
    if ShapingConfig(**operations) != ShapingConfig():
        steps.append(RewardShaping(**operations))
    if drop_cut:
        steps.append(DropEpisodes(cut=True))
    if config.algorithm.min_groups is not None:
        steps.append(SampleGroups(config.algorithm.min_groups, config.algorithm.max_rollouts))
    return steps
