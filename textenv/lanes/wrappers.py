"""The check of the Gymnasium wrappers around a `TextEnv`."""

from __future__ import annotations

import sys

from gymnasium.wrappers import RecordEpisodeStatistics


def check_wrappers() -> None:
    """Refuse a RecordEpisodeStatistics that would overwrite `info["episode"]`; `TextEnv.reset` calls it.

    An env does not know its wrappers, but their `reset` methods call its own, so they are found on the stack. Without
    this check the first episode would end with `assert self._stats_key not in info` in
    `RecordEpisodeStatistics.step` (gymnasium `wrappers/common.py`), which has no message.

    Raises:
        ValueError: If there is a RecordEpisodeStatistics with the default `stats_key`.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        wrapper = frame.f_locals.get("self")
        if isinstance(wrapper, RecordEpisodeStatistics) and wrapper._stats_key == "episode":
            raise ValueError(
                "Expected RecordEpisodeStatistics(env, stats_key='statistics') around a TextEnv, whose own info has "
                "the key 'episode', got the default stats_key, 'episode'."
            )
