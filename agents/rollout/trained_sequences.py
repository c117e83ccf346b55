"""The choice of the sequences that are trained after a rollout, and of those that wait for a later rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from textenv.episodes.scores import RewardError
from textenv.lanes.finished_episodes import Place

from ..distributed.collectives import gather, raise_together
from .advantages import Advantage, AdvantageFunction, episode_advantages
from .dynamic_sampling import with_signal
from .ended_episodes import EndedEpisode, RolloutGroups
from .estimation import Estimation
from .transitions import Segment, Transitions, joined


class FinishedRollout(NamedTuple):
    """A rollout with its returns: the input of the functions below.

    Attributes:
        segments: The segments, in the order of their ends.
        read: Returns the transitions of a segment, as views of the buffer's arrays.
        episode_starts: Whether an episode began at a step of a lane, (T, B).
        dropped: The last step and the lane of each episode that is not trained.
        estimation: The settings by which advantages and returns were estimated.
        advantage: The name of the advantages that are trained, or a function.
    """

    segments: list[Segment]
    read: Callable[[Segment], Transitions]
    episode_starts: np.ndarray
    dropped: set[tuple[int, int]]
    estimation: Estimation
    advantage: Advantage | AdvantageFunction

    def is_dropped(self, segment: Segment) -> bool:
        """Return whether the episode that ended with a segment is not trained."""
        return (segment.end - 1, segment.lane) in self.dropped


class TrainedSequence(NamedTuple):
    """A sequence that is trained."""

    segment: Segment
    copied: Transitions | None  # its transitions if they span several rollouts; None: read from the buffer when needed


class TrainedSequences:
    """The sequences that a rollout trains on.

    The transitions of most of them stay in the buffer's arrays until a minibatch is made, so that nothing is stored
    twice.

    Args:
        rollout: The rollout that the sequences come from.
        sequences: The sequences, in order.
        n_dropped: The number of ended episodes that are left out because the reward dropped them.
        members: The number of each sequence's group of samples, (S,); None without groups.
    """

    def __init__(
        self,
        rollout: FinishedRollout,
        sequences: list[TrainedSequence],
        n_dropped: int,
        members: np.ndarray | None = None,
    ) -> None:
        self._rollout, self._sequences, self.n_dropped, self.members = rollout, sequences, n_dropped, members
        self.counts = np.array([len(part.actions) for part in self], dtype=np.int64)  # (S,): transitions per sequence

    def or_segments(self) -> TrainedSequences:
        """Return these sequences; if there are none, the rollout's segments, which stand in for them at weight 0.

        Each process must take part in each backward pass, with some sequence.
        """
        return self if len(self) else TrainedSequences(self._rollout, ended_sequences(self._rollout, None), 0)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._sequences)

    def __iter__(self) -> Iterator[Transitions]:
        """Yield the transitions of each sequence."""
        return map(self.transitions, range(len(self)))

    def segment(self, sequence: int) -> Segment:
        """Return the segment that holds the tokens of a sequence."""
        return self._sequences[sequence].segment

    def transitions(self, sequence: int) -> Transitions:
        """Return the transitions of a sequence."""
        segment, copied = self._sequences[sequence]
        return self._rollout.read(segment) if copied is None else copied


def check_some_left(trained: TrainedSequences) -> None:
    """Check that dropped episodes have left one to train on; all processes must call it.

    Raises:
        RewardError: In all processes, if all episodes that ended were dropped in one of them.
    """
    none_left = RewardError(
        f"Expected an episode to train on, got none: all {trained.n_dropped} that ended were dropped. Let the reward "
        "raise, to see why (on_failure='raise'), or raise n_steps, or max_new_tokens where cut texts are dropped."
    )
    raise_together(none_left if trained.n_dropped and not len(trained) else None)


def ended_sequences(rollout: FinishedRollout, waiting: dict[int, Transitions] | None) -> list[TrainedSequence]:
    """Return the sequences of a rollout that can be trained on: all segments, or those that end an episode.

    Args:
        rollout: The rollout.
        waiting: By lane, the transitions of its unfinished episode from earlier rollouts; updated in place. None if
            episodes are trained in parts.
    """
    if waiting is None:
        return [TrainedSequence(segment, None) for segment in rollout.segments]
    sequences = []
    for segment in rollout.segments:
        later, copied = rollout.read(segment), None
        earlier = waiting.pop(segment.lane, None)
        if earlier is not None and not rollout.episode_starts[segment.start, segment.lane]:
            # The advantages after the earlier part were not known when its rollout ended.
            rollout.estimation.carry(earlier, later.advantages[0], later.values[0], later.returns[0])
            later = copied = joined([earlier, later])
        if segment.is_finished:
            sequences.append(TrainedSequence(segment, copied))
        else:
            waiting[segment.lane] = joined([later])  # a copy: the next rollout overwrites the buffer's arrays
    return sequences


def choose_sequences(rollout: FinishedRollout, waiting: dict[int, Transitions] | None) -> TrainedSequences:
    """Return the sequences of a rollout that are trained, without those whose episode was dropped.

    Args:
        rollout: The rollout.
        waiting: As in `ended_sequences`.
    """
    ended = ended_sequences(rollout, waiting)
    kept = [sequence for sequence in ended if not rollout.is_dropped(sequence.segment)]
    trained = TrainedSequences(rollout, kept, len(ended) - len(kept))
    if waiting is not None:
        _estimate(rollout, list(trained), None)
    return trained


def _estimate(rollout: FinishedRollout, episodes: list[Transitions], groups: np.ndarray | None) -> None:
    """Write the advantages of whole episodes, which depend on their lengths or on each other, into their arrays.

    Args:
        rollout: The rollout.
        episodes: The episodes, in the buffer's arrays or in copies.
        groups: The number of each episode's group, (E,); None without groups.
    """
    for part in episodes:
        rollout.estimation.adapt(part)
    if rollout.advantage != "gae" and episodes:
        advantages = episode_advantages(episodes, groups, rollout.advantage, rollout.estimation.gamma)
        for part, own in zip(episodes, advantages, strict=True):
            part.advantages[:] = own


def choose_groups(
    rollout: FinishedRollout,
    waiting: dict[int, Transitions],
    waiting_episodes: dict[Place, EndedEpisode],
    groups: RolloutGroups,
) -> tuple[TrainedSequences, dict[Place, EndedEpisode]]:
    """Return the episodes of whole groups, without dropped ones, and those that wait.

    They wait for others of their group or, with dynamic sampling, for further groups.

    Args:
        rollout: The rollout.
        waiting: As in `ended_sequences`.
        waiting_episodes: The episodes that waited until now.
        groups: The groups of the episodes that ended in the rollout.
    """
    ended = TrainedSequences(rollout, ended_sequences(rollout, waiting), 0)
    episodes = dict(waiting_episodes)
    for i, part in enumerate(ended):
        segment = ended.segment(i)
        place = (groups.record.first_step + segment.end - 1, segment.lane)
        episode = groups.ended(place, segment, part)
        if episode is not None:
            episodes[place] = episode._replace(is_dropped=rollout.is_dropped(segment))
    whole, still_waiting = groups.split(episodes)
    whole, held = choose_by_signal(whole, waiting_episodes, groups)
    n_dropped = sum(episode.is_dropped for episode in whole.values())
    whole = {place: episode for place, episode in whole.items() if not episode.is_dropped}
    for place in whole.keys() & waiting_episodes.keys():  # a late score may have changed the rewards since
        rollout.estimation.carry(whole[place].part)
    parts = [episode.part for episode in whole.values()]
    ids = np.array([episode.group for episode in whole.values()], dtype=np.int64)  # (E,)
    _estimate(rollout, parts, ids)
    sequences = [
        TrainedSequence(Segment(lane, 0, len(part.actions), episode.tokens, True, episode.n_prompt), part)
        for ((_, lane), episode), part in zip(whole.items(), parts, strict=True)
    ]
    kept = {place: episode._replace(part=joined([episode.part])) for place, episode in (still_waiting | held).items()}
    return TrainedSequences(rollout, sequences, n_dropped, ids), kept


def choose_by_signal(
    whole: dict[Place, EndedEpisode], earlier: Mapping[Place, EndedEpisode], groups: RolloutGroups
) -> tuple[dict[Place, EndedEpisode], dict[Place, EndedEpisode]]:
    """Return the episodes of whole groups that are trained after a rollout, and those that wait for further groups.

    With dynamic sampling, groups whose scores are all equal are in neither. Without, all are trained.

    Args:
        whole: The episodes of whole groups.
        earlier: The episodes that waited until now; a group of which one is not among them became whole just now.
        groups: The groups of the rollout, which log how many have a signal.
    """
    compared = [episode for episode in whole.values() if not episode.is_dropped]
    scores = np.array([episode.part.task_rewards.sum(dtype=np.float64) for episode in compared])  # (E,)
    signals = with_signal(scores, np.array([episode.group for episode in compared], dtype=np.int64))
    new = {episode.group for place, episode in whole.items() if place not in earlier}
    n_with_signal, n_new = np.sum(gather("the signals of groups", (len(new & signals), len(new))), axis=0)
    if n_new:
        groups.log("signal", float(n_with_signal / n_new))
    if groups.dynamic.min_groups is None:
        return whole, {}
    is_full = groups.dynamic.is_full(len(signals))
    chosen = {place: episode for place, episode in whole.items() if episode.group in signals}
    groups.log("dropped", len(new - signals))
    groups.log("extra_tokens", sum(len(e.part.actions) for e in whole.values() if e.group not in signals))
    groups.log("trained", len(signals) if is_full else 0)
    return (chosen, {}) if is_full else ({}, chosen)
