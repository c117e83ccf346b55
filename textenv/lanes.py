"""The array core: N episodes side by side. The environments for Gymnasium and Stable-Baselines3 are its front ends."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from textenv.completion import Preds
from textenv.dealing import PromptDealer
from textenv.episode import EndReason
from textenv.finished import (
    FinishedEpisode,
    Place,
    final_info,
    finished_state,
    load_finished,
    load_prompt,
    prompt_state,
    split_groups,
)
from textenv.lane_hooks import EpisodeHost
from textenv.lane_masks import LaneMasks
from textenv.lane_state import LaneState
from textenv.prompts import Prompt, PromptLike
from textenv.reward_calls import RewardCalls
from textenv.turn_ends import EpisodeEnd, end_turns, lane_preds, turn_limits

MAX_LANES = 2**16


class StepResult(NamedTuple):
    """What a step of all lanes returns; every array and dict is fresh."""

    observations: np.ndarray  # (B, L), after the refill
    rewards: np.ndarray  # (B,) float64
    terminated: np.ndarray  # (B,) bool
    truncated: np.ndarray  # (B,) bool
    infos: list[dict[str, Any]]  # of the episode that ended; empty otherwise
    final_observations: dict[int, np.ndarray]  # of the episodes that ended, by lane


class Lanes:
    """N episodes of one `TextEnv` in arrays: append a token to each, score them, refill those that end.

    The env gives the rules, the prompts and the hooks; it keeps no state of the episodes. A lane without a prompt is
    idle: its observation is the separator alone, its actions are ignored, it earns nothing and never ends. Only
    `reset(prompts=...)` makes idle lanes, when its rows run out.

    Args:
        env: The environment.
        n_lanes: How many episodes run side by side.
        autoreset: Whether a lane begins the next episode in the step that ends one; else `reset` must follow.

    Attributes:
        state: The running episodes.
        dealer: Deals the prompts.
        defer_scores: Whether finished episodes wait for `score_unscored`; whoever runs the lanes sets it.
        accepts_dropped: Whether the reward may drop episodes, since whoever runs the lanes leaves them out; set, too.
        unscored: The episodes that wait for `score_unscored`.
        waiting: Those that it passed over, since others of their group still run.
        n_steps: How many steps the lanes have taken.
        reset_at: The step before which `reset` was called last.
    """

    def __init__(self, env: EpisodeHost, n_lanes: int, autoreset: bool = True) -> None:
        if not 1 <= n_lanes <= MAX_LANES:
            raise ValueError(
                f"Expected 1 to {MAX_LANES:,} lanes, got {n_lanes:,}: 64 to 1,024 are usual (n_envs, num_envs)."
            )
        self.env = env
        self.n_lanes = n_lanes
        self.autoreset = autoreset
        self.width = env.max_prompt_tokens + 1 + env.rules.room
        self.dealer = PromptDealer(env)
        self.n_steps = 0  # since this object was made: `reset` goes on counting
        self.reset_at = 0
        self.defer_scores = False
        self.accepts_dropped = False
        self.unscored: list[FinishedEpisode] = []
        self.waiting: list[FinishedEpisode] = []
        self.start_time = time.monotonic()
        self.reward_calls = RewardCalls(env)
        self.masks = LaneMasks(env.masks, env.vocabulary, n_lanes)
        self.state = LaneState.empty(n_lanes, self.width)

    @property
    def tokens(self) -> np.ndarray:
        """The observations, (B, L) int64: not a copy."""
        return self.state.tokens

    @property
    def idle(self) -> np.ndarray:
        """Which lanes have no prompt, (B,) bool: not a copy."""
        return self.state.idle

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each lane; an idle lane has an empty one."""
        return [episode.prompt for episode in self.state.episodes]

    def reset(self, seed: int | None = None, prompts: Sequence[PromptLike] | None = None) -> np.ndarray:
        """Begin a new episode in every lane and return the observations, (B, L).

        Args:
            seed: Starts the prompts' order anew; None goes on where the cursor stands.
            prompts: Rows to run instead of the env's own, each exactly once, in lane order; then lanes go idle.
                Without autoreset the following resets take the rest of them.
        """
        dealer = self.dealer
        if seed is not None or dealer.cursor is None:
            dealer.seed(seed if seed is not None else self.env.draw_seed())
        if prompts is not None:
            dealer.give(prompts)
        elif self.autoreset or not dealer.queue:
            dealer.queue = None
        if self.autoreset:  # all members of a group begin behind the reset
            dealer.left = 0
        self.state = LaneState.empty(self.n_lanes, self.width)
        self.unscored.clear()
        self.waiting.clear()
        self.reset_at = self.n_steps
        for lane in range(self.n_lanes):
            self._refill(lane)
        return self.tokens.copy()

    def _refill(self, lane: int) -> None:
        prompt, group = self.dealer.deal()
        own_limit = None if prompt is None else prompt.max_new_tokens
        self.state.begin(lane, prompt, group, own_limit or self.env.rules.max_new_tokens)

    def step(self, actions: np.ndarray) -> StepResult:
        """Append one token to every lane; score, and refill the lanes whose episode is over.

        Args:
            actions: Token ids, (B,).

        Raises:
            RuntimeError: Before the first `reset`.
            ValueError: If the actions have another shape or dtype, or an id is outside the vocabulary.
            RewardError: If a reward hook raises or returns no finite number, or drops a row that must have a reward.
        """
        if self.dealer.cursor is None or self.state.over.any():
            raise RuntimeError(
                "Expected `reset` before the first `step`, and after the end of an episode or a step that raised."
            )
        actions = self._checked(actions)
        self.state.over[:] = True  # until the step is whole: a hook may raise
        self.state.append(actions)
        ends = end_turns(self.env, self.state, actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.n_lanes)]
        rewards, dropped = self._score(ends)
        terminated, truncated = np.zeros(self.n_lanes, dtype=bool), np.zeros(self.n_lanes, dtype=bool)
        final_observations = {}
        for lane in sorted(ends):
            end, episode = ends[lane], self.state.episodes[lane]
            is_cut = end.reason is EndReason.LENGTH and self.env.rules.length_limit == "truncate"
            terminated[lane], truncated[lane] = not is_cut, is_cut
            final_observations[lane] = self.state.tokens[lane].copy()
            infos[lane] = self._final_info(lane, end) | {"dropped": bool(dropped[lane])}
            if self.defer_scores:
                place = self.n_steps, lane
                self.unscored.append(FinishedEpisode(place, episode.prompt, end.preds, infos[lane]))
            elif not dropped[lane]:
                self.dealer.observe(episode.prompt, episode.reward)
            if self.autoreset:
                self._refill(lane)
        self.state.over[:] = False if self.autoreset else terminated | truncated
        self.n_steps += 1
        return StepResult(self.state.tokens.copy(), rewards, terminated, truncated, infos, final_observations)

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions)
        if actions.shape != (self.n_lanes,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"Expected one integer token id a lane, shape ({self.n_lanes},), got {actions.dtype} of shape "
                f"{actions.shape}."
            )
        vocabulary = len(self.env.tokenizer)
        outside = (actions < 0) | (actions >= vocabulary)
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            raise ValueError(f"Expected token ids in [0, {vocabulary}), got {actions[lane]} in lane {lane}.")
        return actions

    def most_new_tokens(self) -> np.ndarray:
        """Return how many tokens the policy may still write in each lane's current turn, (B,)."""
        return turn_limits(self.env.rules, self.state) - self.state.generated

    def turn_limit(self, prompt: Prompt) -> int:
        """Return how many tokens the policy may write in the first turn after a prompt."""
        return self.env.rules.turn_tokens or prompt.max_new_tokens or self.env.rules.max_new_tokens

    def preds(self, lane: int) -> Preds:
        """Return a snapshot of the completion in a lane."""
        return lane_preds(self.env, self.state, lane)

    def allowed(self) -> np.ndarray:
        """Return which tokens each lane may write next, (B, V) bool; all, where it is idle or its episode is over."""
        is_closed = (self.state.idle | self.state.over).tolist()
        prompts = self.prompts
        return self.masks.allowed(
            [None if closed else (prompts[lane], self.preds(lane)) for lane, closed in enumerate(is_closed)]
        )

    def _score(self, ends: Mapping[int, EpisodeEnd]) -> tuple[np.ndarray, np.ndarray]:
        """Call the reward hook for the rows that want a score now; return rewards and which are dropped, each (B,)."""
        rewards, dropped = np.zeros(self.n_lanes, dtype=np.float64), np.zeros(self.n_lanes, dtype=bool)
        lanes, episodes = np.flatnonzero(~self.state.idle).tolist(), self.state.episodes
        if self.env.score_at != "step":
            lanes = [] if self.defer_scores else sorted(ends)
        scored = self.reward_calls.score(
            [episodes[lane].prompt for lane in lanes],
            [ends[lane].preds if lane in ends else self.preds(lane) for lane in lanes],
            [lane in ends for lane in lanes],
            self.accepts_dropped,
        )
        for lane, reward in zip(lanes, scored, strict=True):
            episode = episodes[lane]
            rewards[lane], episode.failed = reward.value, episode.failed or reward.has_failed
            dropped[lane] = reward.is_dropped or (episode.failed and self.env.on_failure == "drop")
            episode.reward += reward.value
            for name, part in reward.parts.items():
                episode.parts[name] = episode.parts.get(name, 0.0) + part
        if lanes and ends:
            self.env.failures.count(len(ends), sum(episodes[lane].failed for lane in ends))
        return rewards, dropped

    def open_groups(self) -> set[int]:
        """Return the groups of which members run or are still to be dealt."""
        running = {self.state.episodes[lane].group for lane in np.flatnonzero(~self.state.idle)}
        return running | self.dealer.open_groups()

    def score_unscored(self) -> list[tuple[Place, dict[str, Any], float]]:
        """Score the finished episodes that wait, in one call; their info dicts are brought up to date in place.

        The members of a group stand together, and wait until the last of them has ended.

        Returns:
            Place, info and score of each, groups in the order in which their last members ended.
        """
        finished, waiting = split_groups(self.waiting + self.unscored, self.open_groups(), self.dealer.group_size)
        scored = self.reward_calls.score(
            [episode.prompt for episode in finished],
            [episode.preds for episode in finished],
            [True] * len(finished),
            self.accepts_dropped,
        )
        self.env.failures.count(len(scored), sum(reward.has_failed for reward in scored))
        self.unscored, self.waiting = [], waiting  # only now: where the reward fails they stay
        for episode, reward in zip(finished, scored, strict=True):
            episode.info["episode"]["r"] += reward.value
            episode.info["reward_parts"].update(reward.parts)
            episode.info["scored"], episode.info["dropped"] = True, reward.is_dropped
            if not reward.is_dropped:
                self.dealer.observe(episode.prompt, episode.info["episode"]["r"])
        return [(episode.place, episode.info, reward.value) for episode, reward in zip(finished, scored, strict=True)]

    def _final_info(self, lane: int, end: EpisodeEnd) -> dict[str, Any]:
        episode = self.state.episodes[lane]
        figures = {"r": episode.reward, "l": int(self.state.generated[lane])}
        if self.autoreset:  # a lone env keeps to what is deterministic; SB3's Monitor adds its own clock
            figures["t"] = round(time.monotonic() - self.start_time, 6)
        return final_info(episode.prompt, end.preds, end.reason, episode.parts, figures, scored=not self.defer_scores)

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the running episodes and the prompts' order: arrays, and what goes into JSON.

        Raises:
            RuntimeError: While finished episodes wait for a score, other than for their group: save between rollouts.
        """
        if self.unscored or self.dealer.cursor is None:
            raise RuntimeError("Expected to be saved after `reset` and between rollouts, with every episode scored.")
        arrays, meta = self.state.state_dict()
        return arrays, {
            **meta,
            **self.dealer.state_dict(),
            "n_steps": self.n_steps,
            "reset_at": self.reset_at,
            "waiting": [copy.deepcopy(finished_state(episode)) for episode in self.waiting],
            "prompts": [prompt_state(prompt) for prompt in self.prompts],
        }

    def load_state_dict(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> np.ndarray:
        """Go on from what `state_dict` returned; return the observations, (B, L).

        Raises:
            ValueError: If it was saved with another number of lanes, width or number of prompts.
        """
        if arrays["tokens"].shape != self.tokens.shape:
            raise ValueError(
                f"Expected running episodes of shape {self.tokens.shape} (lanes, width), got {arrays['tokens'].shape}: "
                "resume with the same n_envs, max_prompt_tokens and max_new_tokens."
            )
        self.dealer.load_state_dict(meta)
        saved_prompts = zip(arrays["idle"], meta["prompts"], strict=True)
        prompts = [Prompt() if idle else load_prompt(self.env, saved) for idle, saved in saved_prompts]
        self.state = LaneState.load(arrays, meta, prompts)
        self.n_steps, self.reset_at = meta["n_steps"], meta["reset_at"]
        self.unscored.clear()
        self.waiting = [load_finished(self.env, state) for state in meta["waiting"]]
        return self.tokens.copy()
