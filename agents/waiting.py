"""Episodes that have ended, and those of them that wait for the rest of their group of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from textenv.finished import Place

from .rollout_record import RolloutRecord
from .transitions import Segment, Transitions


class EndedEpisode(NamedTuple):
    """A whole episode of which no token has been trained."""

    group: int
    tokens: np.ndarray  # (T,) int32: prompt and actions up to, not including, the last action
    n_prompt: int  # how many of the tokens are the prompt's
    part: Transitions
    is_dropped: bool = False  # counts as a member of its group, and is not trained on


class RolloutGroups(NamedTuple):
    """What the env knows of groups of samples at the end of a rollout; `SampleGroups` hands it to the buffer."""

    record: RolloutRecord  # of the episodes that ended in the rollout
    open_groups: set[int]  # groups of which members run or are still to come
    size: int  # members of a group
    reset_at: int  # the step before which all was abandoned

    def ended(self, place: Place, segment: Segment, part: Transitions) -> EndedEpisode | None:
        """Return the episode that ended here, or None where none did or some of its tokens were lost.

        A rollout that is broken off loses tokens, and SB3 then goes on with observations that the env left behind.
        """
        info = self.record.ended.get(place)
        if info is None or info["episode"]["l"] != len(part.actions):
            return None
        return EndedEpisode(info["group"], segment.tokens, segment.n_prompt, part)

    def split(
        self, episodes: Mapping[Place, EndedEpisode]
    ) -> tuple[dict[Place, EndedEpisode], dict[Place, EndedEpisode]]:
        """Return the episodes of whole groups, in the order of their places, and those that wait for their group.

        What a reset abandoned, or belongs to a group that lost a member, is in neither.
        """
        kept = {place: episodes[place] for place in sorted(episodes) if place[0] >= self.reset_at}
        counts = Counter(episode.group for episode in kept.values())
        waiting = {place: one for place, one in kept.items() if one.group in self.open_groups}
        whole = {place: one for place, one in kept.items() if place not in waiting and counts[one.group] == self.size}
        return whole, waiting
