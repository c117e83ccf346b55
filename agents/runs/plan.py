"""The training that the words of `textenv train`, or a trial of `textenv tune`, ask for. It does not load torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..configuration.config import TrainConfig

if TYPE_CHECKING:
    from .folder import RunFolder


class Plan(NamedTuple):
    """One run to start or to resume.

    Attributes:
        config: The configuration.
        dumped: The configuration as YAML, for config.yml.
        run: The run to resume; None for a new one.
        before: The configuration of the run to resume.
    """

    config: TrainConfig
    dumped: str
    run: RunFolder | None = None
    before: TrainConfig | None = None
