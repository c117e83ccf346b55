"""Which wrappers of Gymnasium's stand around an environment that is being reset."""

from __future__ import annotations

import sys

from gymnasium.wrappers import RecordEpisodeStatistics


def check_wrappers() -> None:
    """Refuse a RecordEpisodeStatistics that would write where a `TextEnv` writes; called by `reset`.

    An environment does not know its wrappers, but they are who calls it; the wrapper's own check, at the end of the
    first episode, is an assertion without words.

    Raises:
        ValueError: With the argument to give it.
    """
    frame = sys._getframe(1)
    while (above := frame.f_back) is not None:
        frame = above
        wrapper = frame.f_locals.get("self")
        if isinstance(wrapper, RecordEpisodeStatistics) and wrapper._stats_key == "episode":
            raise ValueError(
                "Expected RecordEpisodeStatistics(env, stats_key='statistics') around a TextEnv, whose own info has "
                "the key 'episode', got the default stats_key, 'episode'."
            )
