"""The state of all running episodes, in one object that is cleared, saved and loaded as a whole.

The tokens of all lanes and their counts are arrays, since every step changes them in every lane: a loop over lanes in
Python takes 6 times as long with 1,024 lanes. The rest of the state is one `RunningEpisode` per lane.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from textenv.episodes.completion import Turn
from textenv.episodes.rules import PADDING, SEPARATOR
from textenv.prompts.prompts import Prompt
from textenv.text.tokenizer import BOUNDARY_TOKENS

NO_GROUP = -1  # the group of a lane without a prompt
ARRAYS = ("tokens", "lengths", "turn_starts", "generated", "limits", "idle", "over")


@dataclass(slots=True)
class RunningEpisode:
    """The episode of one lane, apart from its tokens and their counts.

    Attributes:
        prompt: The prompt; an empty one in an idle lane.
        group: The number of the episode's group of samples.
        reward: The sum of the episode's rewards so far.
        parts: The sum so far of each named part of these rewards.
        failed: Whether the reward failed at one of the episode's tokens.
        turns: The turns before the current one, each with its reply.
        written: The token ids of those turns, without the replies.
        state: `preds.state`, in which the env's hooks remember things about the episode.
    """

    prompt: Prompt = field(default_factory=Prompt)
    group: int = NO_GROUP
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    failed: bool = False
    turns: list[Turn] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class LaneState:
    """The running episodes of B lanes.

    Attributes:
        tokens: The observations, (B, L) int64: prompt, separator, turns and replies, padding.
        lengths: The number of columns of `tokens` that are in use, the separator included, (B,) int64.
        turn_starts: The column in which the current turn begins, (B,) int64.
        generated: The number of tokens that the policy has written, (B,) int64.
        limits: The most tokens that the policy may write in this episode, (B,) int64.
        idle: Whether the lane has no prompt, (B,) bool.
        over: Whether the lane waits for `reset`, (B,) bool.
        episodes: The episode of each lane, B of them.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    turn_starts: np.ndarray
    generated: np.ndarray
    limits: np.ndarray
    idle: np.ndarray
    over: np.ndarray
    episodes: list[RunningEpisode]

    @classmethod
    def empty(cls, n_lanes: int, width: int) -> LaneState:
        """Return idle lanes: each observation is the separator alone."""
        tokens = np.full((n_lanes, width), PADDING, dtype=np.int64)
        tokens[:, 0] = SEPARATOR
        return cls(
            tokens=tokens,
            lengths=np.ones(n_lanes, dtype=np.int64),
            turn_starts=np.ones(n_lanes, dtype=np.int64),
            generated=np.zeros(n_lanes, dtype=np.int64),
            limits=np.ones(n_lanes, dtype=np.int64),
            idle=np.ones(n_lanes, dtype=bool),
            over=np.zeros(n_lanes, dtype=bool),
            episodes=[RunningEpisode() for _ in range(n_lanes)],
        )

    def begin(self, lane: int, prompt: Prompt | None, group: int, limit: int) -> None:
        """Begin an episode in a lane.

        Args:
            lane: The lane.
            prompt: The prompt; None makes the lane idle.
            group: The number of the group of samples.
            limit: The most tokens that the policy may write.
        """
        episode = RunningEpisode(Prompt() if prompt is None else prompt, group)
        n_prompt = len(episode.prompt.ids)
        self.tokens[lane] = PADDING  # the whole row, since the last episode may have been longer
        self.tokens[lane, :n_prompt] = episode.prompt.ids
        self.tokens[lane, n_prompt] = SEPARATOR
        self.lengths[lane] = self.turn_starts[lane] = n_prompt + 1
        self.generated[lane] = 0
        self.limits[lane] = limit
        self.idle[lane] = prompt is None
        self.episodes[lane] = episode

    def append(self, actions: np.ndarray) -> None:
        """Append a token to every lane that is not idle.

        Args:
            actions: Token ids, (B,).
        """
        active = np.flatnonzero(~self.idle)  # (A,), A of the B lanes
        self.tokens[active, self.lengths[active]] = actions[active]
        self.lengths[active] += 1
        self.generated[active] += 1

    def close_turn(self, lane: int, turn: Turn, written: list[int], reply: Sequence[int]) -> None:
        """Append the tokens of a reply, after which the next turn of a lane begins.

        Args:
            lane: The lane.
            turn: The turn that has ended, with its reply.
            written: The token ids of all turns so far.
            reply: The tokens of the reply.
        """
        start = int(self.lengths[lane])
        self.tokens[lane, start : start + len(reply)] = reply
        self.lengths[lane] = self.turn_starts[lane] = start + len(reply)
        self.episodes[lane].turns.append(turn)
        self.episodes[lane].written = written

    def turn(self, lane: int, most: int | None = None) -> np.ndarray:
        """Return the tokens of a lane's current turn, or only the last `most` of them; a view, (t,)."""
        start, end = int(self.turn_starts[lane]), int(self.lengths[lane])
        return self.tokens[lane, start if most is None else max(start, end - most) : end]

    def context(self, lane: int, end: int) -> list[int]:
        """Return the few tokens before column `end`, on which the decoding of the tokens after it depends."""
        # `decode_continuation` reads BOUNDARY_TOKENS of them; one more column, since the separator may be among them.
        near = self.tokens[lane, max(end - BOUNDARY_TOKENS - 1, 0) : end]  # (5,) or fewer
        return near[near >= 0].tolist()

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the episodes without their prompts: arrays, and a dict for JSON."""
        episodes = self.episodes
        arrays = {name: getattr(self, name).copy() for name in ARRAYS} | {
            # (B,) each
            "returns": np.array([episode.reward for episode in episodes], dtype=np.float64),
            "groups": np.array([episode.group for episode in episodes], dtype=np.int64),
            "failed": np.array([episode.failed for episode in episodes], dtype=bool),
        }
        return arrays, {
            "closed": [list(episode.turns) for episode in episodes],
            "closed_ids": [list(episode.written) for episode in episodes],
            "states": copy.deepcopy([episode.state for episode in episodes]),
            "parts": [dict(episode.parts) for episode in episodes],
        }

    @classmethod
    def load(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], prompts: Sequence[Prompt]) -> LaneState:
        """Return the episodes that `state_dict` saved, with the prompts of their lanes."""
        columns = zip(  # in the order of the fields of `RunningEpisode`
            prompts,
            arrays["groups"].tolist(),
            arrays["returns"].tolist(),
            [dict(parts) for parts in meta["parts"]],
            arrays["failed"].tolist(),
            [[Turn(*turn) for turn in turns] for turns in meta["closed"]],
            [list(ids) for ids in meta["closed_ids"]],
            copy.deepcopy(list(meta["states"])),
            strict=True,
        )
        episodes = [RunningEpisode(*row) for row in columns]
        return cls(**{name: np.array(arrays[name]) for name in ARRAYS}, episodes=episodes)


Saved = tuple[dict[str, np.ndarray], dict[str, Any]]  # the result of `LaneState.state_dict`


def side_by_side(saved: Sequence[Saved]) -> Saved:
    """Return several results of `LaneState.state_dict` as one, with the lanes of all of them."""
    arrays = {name: np.concatenate([arrays[name] for arrays, _ in saved]) for name in saved[0][0]}  # (B, ...) each
    # Copied one by one: `LaneState.load` copies whole lists, in which an object that stands twice stays one object.
    return arrays, {name: [copy.deepcopy(entry) for _, meta in saved for entry in meta[name]] for name in saved[0][1]}
