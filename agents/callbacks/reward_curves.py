"""The callback that draws reward, divergence and length over a training, at its end."""

from __future__ import annotations

import math
import os
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from ..distributed.collectives import gather
from ..distributed.world import is_main_process
from ..evaluation.curves import CURVES, check_matplotlib, check_picture, draw_curves
from ..steps.data_parallel import merge


class RewardCurves(BaseCallback):
    """Draws the reward, the divergence from the reference and the length over training, as a PNG at the end.

    It needs matplotlib (`pip install "textenv[plot]"`), and `EpisodeMetrics` before it in the list of callbacks. The
    divergence is drawn if a `KLPenalty` logs it.

    Args:
        path: The picture's file.
        title: The title of the picture.

    Raises:
        ImportError: When training starts, without matplotlib.
        FileExistsError: When training starts, if `path` is a folder, or a file that is no PNG.

    Example:
        >>> from agents import EpisodeMetrics, RewardCurves
        >>> # model.learn(100_000, callback=[EpisodeMetrics(), RewardCurves("curves.png")])
    """

    def __init__(self, path: str | os.PathLike[str], title: str = "") -> None:
        super().__init__()
        self.path, self.title = Path(path), title
        self.history: list[dict[str, float]] = []

    def _on_training_start(self) -> None:
        check_matplotlib()
        check_picture(self.path)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        # The figures of this rollout that the callbacks before this one recorded, merged over all processes.
        values = merge(gather("figures", dict(self.logger.name_to_value)))
        row = {key: float(values.get(key, math.nan)) for key, _ in CURVES}
        self.history.append({"tokens": self.model.num_timesteps, **row})

    def _on_training_end(self) -> None:
        if is_main_process():
            draw_curves(self.path, {"": self.history}, self.title)
