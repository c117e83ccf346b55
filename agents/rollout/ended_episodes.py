"""The episodes that have ended, and wait in the buffer until all samples of their prompt have ended."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from textenv.lanes.finished_episodes import Place

from .dynamic_sampling import DynamicSampling
from .rollout_record import RolloutRecord
from .transitions import Segment, Transitions


class EndedEpisode(NamedTuple):
    """An episode from its first to its last token, none of which has been trained."""

    group: int  # the number of its group of samples
    tokens: np.ndarray  # (T,) int32: the prompt, then all actions but the last
    n_prompt: int  # the number of tokens of the prompt
    part: Transitions  # the transitions of all its actions
    is_dropped: bool = False  # whether it counts as a member of its group without being trained on


class RolloutGroups(NamedTuple):
    """The env's groups of samples at the end of a rollout, which `SampleGroups` hands to the buffer."""

    record: RolloutRecord  # the infos of the episodes that ended in the rollout
    open_groups: set[int]  # the groups with a member that still runs or has not begun
    size: int  # the number of members of a group
    reset_at: int  # the step of the env's last reset, which abandoned all groups begun before it
    can_wait: bool  # whether a rollout without a whole group may wait for the next
    dynamic: DynamicSampling  # the choice of the rollouts after which groups with a signal are trained
    log: Callable[[str, float], None]  # records a figure of the groups by its name

    def ended(self, place: Place, segment: Segment, part: Transitions) -> EndedEpisode | None:
        """Return the episode that ended with a segment, or None if none did or some of its tokens were lost.

        A rollout that is broken off loses tokens: SB3 `on_policy_algorithm.collect_rollouts` then returns before it
        sets `_last_obs`, so that the next call starts from observations that the env has left behind.

        Args:
            place: The step and the lane at which the segment ended.
            segment: The segment.
            part: The transitions of the whole episode, as far as the buffer has them.
        """
        info = self.record.ended.get(place)
        if info is None or info["episode"]["l"] != len(part.actions):
            return None
        return EndedEpisode(info["group"], segment.tokens, segment.n_prompt, part)

    def split(
        self, episodes: Mapping[Place, EndedEpisode]
    ) -> tuple[dict[Place, EndedEpisode], dict[Place, EndedEpisode]]:
        """Return the episodes of whole groups, in the order of their places, and those that wait for their group.

        An episode that a reset abandoned, or whose group lost a member, is in neither.
        """
        kept = {place: episodes[place] for place in sorted(episodes) if place[0] >= self.reset_at}
        counts = Counter(episode.group for episode in kept.values())
        waiting = {place: episode for place, episode in kept.items() if episode.group in self.open_groups}
        whole = {
            place: episode
            for place, episode in kept.items()
            if place not in waiting and counts[episode.group] == self.size
        }
        return whole, waiting

    def warn_of_idle_update(self) -> None:
        """Warn of an update that changes nothing, unless it is one in which groups wait for more, as was asked for."""
        dynamic = self.dynamic
        if dynamic.min_groups is None:
            warnings.warn(
                f"No group of {self.size} samples is whole after this rollout: its episodes wait for the others "
                "of their group, and the update changes nothing. Raise n_envs or n_steps to train on each rollout.",
                stacklevel=4,
            )
        elif dynamic.n_rollouts == 0:  # the bound is reached
            warnings.warn(
                f"No group of {self.size} samples had different scores in max_rollouts={dynamic.max_rollouts} rollouts "
                "of dynamic sampling: the update changes nothing. The prompts are too hard or too easy for the model, "
                "or the reward is constant.",
                stacklevel=4,
            )
