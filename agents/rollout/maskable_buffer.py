"""The rollout buffer for MaskablePPO of sb3-contrib."""

from __future__ import annotations

from typing import Any

import numpy as np
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer

from .buffer import SequenceRolloutBuffer


class MaskableSequenceRolloutBuffer(SequenceRolloutBuffer, MaskableRolloutBuffer):  # type: ignore[misc]
    """`SequenceRolloutBuffer` for MaskablePPO, with each distinct mask stored once, as bits or token ids.

    The stock buffer stores float32 (n_steps, n_envs, V): 4.6 GiB for 128 steps of 64 lanes at V = 152,000. It is a base
    class only because sb3-contrib `MaskablePPO.collect_rollouts` asserts that.

    Example:
        >>> from agents import MaskableLMPolicy, MaskableSequenceRolloutBuffer
        >>> # MaskablePPO(MaskableLMPolicy, env, rollout_buffer_class=MaskableSequenceRolloutBuffer, ...)
    """

    def add(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> None:
        """Add one step; `action_masks` are not read, since `log_prob` carries the allowed tokens (`ALLOWED`)."""
        super().add(*args, **kwargs)
