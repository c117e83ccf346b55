"""The options of the verbs that train a stage before PPO, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from ..configuration.config import ProcessOptions, TrustOptions


@dataclass
class StageOptions(TrustOptions):
    """Options of the verbs that train a stage before PPO: only the command line has them.

    Args:
        resume: Continue an interrupted training; repeat its other arguments.
        overwrite: Replace an earlier output of the same kind in --out.
        quiet: Show no progress.
    """

    resume: bool = False
    overwrite: bool = False
    quiet: bool = False


@dataclass
class SharedStageOptions(StageOptions, ProcessOptions):
    """Options of `textenv sft`, `classifier` and `reward-model`, which several processes can run together."""
