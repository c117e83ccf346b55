"""The division of a rollout into segments, lane by lane, while it is collected."""

from __future__ import annotations

import numpy as np

from textenv.episodes.rules import PADDING, SEPARATOR

from .transitions import Segment


class SegmentRecorder:
    """Keeps the last observations of all lanes, and closes a segment when a lane's episode is over.

    Args:
        n_lanes: The number of lanes, B.
    """

    def __init__(self, n_lanes: int) -> None:
        self._segments: list[Segment] = []
        self._starts = np.zeros(n_lanes, dtype=np.int64)  # (B,) the first step of each lane's open segment
        self._last = np.zeros((n_lanes, 0), dtype=np.int32)  # (B, W) the last observations, as wide as the longest

    def add(self, step: int, observations: np.ndarray, episode_starts: np.ndarray) -> np.ndarray:
        """Add the observations of a step, and close the segments of lanes whose row does not continue the last one.

        Args:
            step: The number of the step in the rollout.
            observations: The observations, (B, L).
            episode_starts: Whether they begin an episode, (B,).

        Returns:
            The number of tokens in each row, (B,).
        """
        if step > 0:
            same = (observations[:, : self._last.shape[1]] == self._last) | (self._last == PADDING)  # (B, W)
            # Not by `episode_starts` alone: after `learn` was broken off inside a rollout, SB3 starts from observations
            # that the env has left behind, and the next row is another episode's.
            continues = same.all(axis=1) & (np.asarray(episode_starts) == 0)  # (B,)
            for lane in np.flatnonzero(~continues):
                self._close(int(lane), step, is_finished=True)
        lengths = (observations >= 0).sum(axis=1)  # (B,)
        self._last = observations[:, : lengths.max() + 1].astype(np.int32)  # + 1 for the separator
        return lengths

    def finish(self, n_steps: int, dones: np.ndarray) -> list[Segment]:
        """Close the segments of all lanes at the end of a rollout; return all segments in the order of their ends.

        Args:
            n_steps: The number of steps of the rollout.
            dones: Whether the last step ended each lane's episode, (B,).
        """
        for lane, done in enumerate(dones):
            self._close(lane, n_steps, is_finished=bool(done))
        self._last = np.zeros((len(dones), 0), dtype=np.int32)  # frees the memory: the segments have the tokens
        return self._segments

    def _close(self, lane: int, end: int, is_finished: bool) -> None:
        row = self._last[lane]
        n_prompt = int((row == SEPARATOR).argmax())
        tokens = row[row >= 0]  # without separator and padding, which are negative
        self._segments.append(Segment(lane, int(self._starts[lane]), end, tokens, is_finished, n_prompt))
        self._starts[lane] = end
