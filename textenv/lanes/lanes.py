"""The array core behind the environments for Gymnasium and Stable-Baselines3: N episodes side by side."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from textenv.episodes.completion import Preds
from textenv.episodes.rules import EndReason
from textenv.lanes.finished_episodes import (
    FinishedEpisode,
    Place,
    final_info,
    finished_state,
    load_finished,
    load_prompt,
    prompt_state,
    split_groups,
)
from textenv.lanes.hooks import EpisodeHost
from textenv.lanes.prompt_dealer import PromptDealer
from textenv.lanes.reward_calls import RewardCalls
from textenv.lanes.state import LaneState, Saved, side_by_side
from textenv.lanes.turn_ends import EpisodeEnd, end_turns, lane_preds, turn_limits
from textenv.masks.lane_masks import LaneMasks
from textenv.prompts.prompts import Prompt, PromptLike

MAX_LANES = 2**16  # a larger number is a mistake: the observations alone would fill the memory


class StepResult(NamedTuple):
    """The result of a step of all lanes; all arrays and dicts are new, so the caller may write to them.

    Attributes:
        observations: The observations, (B, L) int64; in a lane whose episode ended, the next episode's first one.
        rewards: The rewards, (B,) float64.
        terminated: Whether the episode terminated, (B,) bool.
        truncated: Whether the episode was truncated, (B,) bool.
        infos: The info of each lane, empty unless its episode ended.
        final_observations: The last observations of the episodes that ended, (L,) each, by lane.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: list[dict[str, Any]]
    final_observations: dict[int, np.ndarray]


class Lanes:
    """N episodes of one env: a step appends a token to each, scores them, and refills the lanes whose episode ends.

    The env has the rules, the prompts and the hooks; the lanes have the state of the episodes. A lane without a prompt
    is idle: its observation is the separator alone, its actions are ignored, its reward is 0 and it never ends. Lanes
    are idle only once the rows of `reset(prompts=...)` have run out.

    Args:
        env: The environment.
        n_lanes: The number of episodes that run side by side, B.
        autoreset: Whether a lane begins the next episode in the step that ends one; otherwise `reset` must follow.
        accepts_dropped: The value of the attribute until `begin_rollout`.

    Attributes:
        state: The running episodes.
        dealer: The dealer of prompts.
        masks: The masks of the lanes.
        reward_calls: The calls of the env's reward, and their time.
        defer_scores: Whether finished episodes wait for `score_unscored`; see `begin_rollout`.
        accepts_dropped: Whether the caller can leave out episodes that the reward drops; see `begin_rollout`.
        unscored: The episodes that have ended since the last `score_unscored`, if scores are deferred.
        waiting: Earlier episodes without a score, since other members of their group have not ended.
        n_steps: The number of steps that these lanes have taken; `reset` does not change it.
        reset_at: The value of `n_steps` at the last `reset`.

    Raises:
        ValueError: If `n_lanes` is not in [1, 65536].
    """

    def __init__(self, env: EpisodeHost, n_lanes: int, autoreset: bool = True, accepts_dropped: bool = False) -> None:
        if not 1 <= n_lanes <= MAX_LANES:
            raise ValueError(
                f"Expected 1 to {MAX_LANES:,} lanes, got {n_lanes:,}: 64 to 1,024 are usual (n_envs, num_envs)."
            )
        self.env = env
        self.n_lanes = n_lanes
        self.autoreset = autoreset
        self.width = env.max_prompt_tokens + 1 + env.rules.room  # L; 1 for the separator
        self.dealer = PromptDealer(env)
        self.n_steps = 0
        self.reset_at = 0
        self.defer_scores = False
        self.accepts_dropped = accepts_dropped
        self.unscored: list[FinishedEpisode] = []
        self.waiting: list[FinishedEpisode] = []
        self.start_time = time.monotonic()
        self.reward_calls = RewardCalls(env)
        self.masks = LaneMasks(env.masks, env.vocabulary, n_lanes)
        self.state = LaneState.empty(n_lanes, self.width)

    def begin_rollout(self, defer_scores: bool = False, accept_dropped: bool = False) -> None:
        """Switch on the options of a rollout; those that an earlier call has switched on stay on until `end_rollout`.

        Args:
            defer_scores: Let finished episodes wait for `score_unscored`, and forget those that wait already.
            accept_dropped: Let the reward drop episodes, which the caller then leaves out.
        """
        if defer_scores:
            self.defer_scores = True
            self.unscored.clear()
        self.accepts_dropped |= accept_dropped

    def end_rollout(self) -> None:
        """Score each episode when it ends, and refuse dropped ones, from now on."""
        self.defer_scores = self.accepts_dropped = False

    @property
    def tokens(self) -> np.ndarray:
        """The observations, (B, L) int64; the lanes' own array, not a copy."""
        return self.state.tokens

    @property
    def idle(self) -> np.ndarray:
        """Whether each lane has no prompt, (B,) bool; the lanes' own array, not a copy."""
        return self.state.idle

    @property
    def prompts(self) -> list[Prompt]:
        """The prompt of each lane; an idle lane has an empty one."""
        return [episode.prompt for episode in self.state.episodes]

    def reset(self, seed: int | None = None, prompts: Sequence[PromptLike] | None = None) -> np.ndarray:
        """Begin a new episode in every lane and return the observations, (B, L).

        Args:
            seed: The seed with which the order of prompts starts anew; None continues the order.
            prompts: Rows to run in place of the env's prompts, each exactly once, in their order; lanes that find no
                further row become idle. Without autoreset, each of the next resets takes the next row.
        """
        dealer = self.dealer
        if seed is not None or dealer.cursor is None:
            dealer.seed(seed if seed is not None else self.env.draw_seed())
        if prompts is not None:
            dealer.give(prompts)
        elif self.autoreset or not dealer.queue:
            dealer.queue = None
        if self.autoreset:  # no group has members on both sides of a reset
            dealer.left = 0
        self.state = LaneState.empty(self.n_lanes, self.width)
        self.unscored.clear()
        self.waiting.clear()
        self.reset_at = self.n_steps
        for lane in range(self.n_lanes):
            self._refill(lane)
        return self.tokens.copy()

    def fork(self, saved: Sequence[Saved], prompt: Prompt) -> np.ndarray:
        """Continue copies of running episodes of one prompt, one in each lane, and return the observations, (B, L).

        Each copy is a group of its own and has a `preds.state` of its own. A lane whose episode ends becomes idle.

        Args:
            saved: The state of each lane, B results of `LaneState.state_dict` of one lane of this env.
            prompt: The prompt of these episodes.
        """
        arrays, meta = side_by_side(saved)
        self.reset(0, [prompt])  # takes the only row, so that no lane finds another
        self.state = LaneState.load({**arrays, "groups": np.arange(self.n_lanes)}, meta, [prompt] * self.n_lanes)
        return self.tokens.copy()

    def _refill(self, lane: int) -> None:
        prompt, group = self.dealer.deal()
        own_limit = None if prompt is None else prompt.max_new_tokens
        self.state.begin(lane, prompt, group, own_limit or self.env.rules.max_new_tokens)

    def step(self, actions: np.ndarray) -> StepResult:
        """Append one token to every lane, score, and refill the lanes whose episode is over.

        Args:
            actions: Token ids, (B,).

        Raises:
            RuntimeError: Before the first `reset`.
            ValueError: If the actions have another shape or dtype, or an id is outside the vocabulary.
            RewardError: If the reward raises or returns no finite number, or drops a row that must have a reward.
        """
        if self.dealer.cursor is None or self.state.over.any():
            raise RuntimeError(
                "Expected `reset` before the first `step`, and after the end of an episode or a step that raised."
            )
        actions = self._checked(actions)
        self.state.over[:] = True  # cleared when the step is complete: if a hook raises, `reset` must follow
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
            final_observations[lane] = self.state.tokens[lane].copy()  # before the refill
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
        # A copy, since SB3 `on_policy_algorithm.collect_rollouts` stores an observation after the step that follows it.
        return StepResult(self.state.tokens.copy(), rewards, terminated, truncated, infos, final_observations)

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        """Return the actions as an array, (B,), or raise ValueError unless all are token ids."""
        actions = np.asarray(actions)
        if actions.shape != (self.n_lanes,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"Expected one integer token id a lane, shape ({self.n_lanes},), got {actions.dtype} of shape "
                f"{actions.shape}."
            )
        vocabulary = len(self.env.tokenizer)
        outside = (actions < 0) | (actions >= vocabulary)  # (B,)
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            raise ValueError(f"Expected token ids in [0, {vocabulary}), got {actions[lane]} in lane {lane}.")
        return actions

    def most_new_tokens(self) -> np.ndarray:
        """Return the number of tokens that the policy may still write in each lane's current turn, (B,)."""
        return turn_limits(self.env.rules, self.state) - self.state.generated

    def turn_limit(self, prompt: Prompt) -> int:
        """Return the number of tokens that the policy may write in the first turn after a prompt."""
        return self.env.rules.turn_tokens or prompt.max_new_tokens or self.env.rules.max_new_tokens

    def preds(self, lane: int) -> Preds:
        """Return a snapshot of the completion in a lane."""
        return lane_preds(self.env, self.state, lane)

    def allowed(self) -> np.ndarray:
        """Return which tokens each lane may write next, (B, V) bool: any token if it is idle or its episode is over.

        Raises:
            MaskError: If no token is allowed in a lane.
        """
        is_closed = (self.state.idle | self.state.over).tolist()  # (B,)
        prompts = self.prompts
        return self.masks.allowed(
            [None if closed else (prompts[lane], self.preds(lane)) for lane, closed in enumerate(is_closed)]
        )

    def _score(self, ends: Mapping[int, EpisodeEnd]) -> tuple[np.ndarray, np.ndarray]:
        """Call the reward for the lanes that are scored in this step; return rewards and whether dropped, (B,) each."""
        rewards, dropped = np.zeros(self.n_lanes, dtype=np.float64), np.zeros(self.n_lanes, dtype=bool)
        lanes, episodes = np.flatnonzero(~self.state.idle).tolist(), self.state.episodes
        if self.env.score_at != "step":  # "rollout_end" means "done" unless the caller defers scores
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
        if lanes and ends:  # an episode counts once, at its end, even if each of its tokens is scored
            self.env.failures.count(len(ends), sum(episodes[lane].failed for lane in ends))
        return rewards, dropped

    def open_groups(self) -> set[int]:
        """Return the numbers of the groups with members that are running or not yet begun."""
        running = {self.state.episodes[lane].group for lane in np.flatnonzero(~self.state.idle)}
        return running | self.dealer.open_groups()

    def score_unscored(self) -> list[tuple[Place, dict[str, Any], float]]:
        """Score the finished episodes that wait, in one call of the reward, and complete their infos in place.

        Episodes of a group wait for its last member, and are scored together.

        Returns:
            The place, info and score of each episode, group by group, in the order in which the groups became complete.

        Raises:
            RewardError: As `step` does; the episodes continue to wait.
        """
        finished, waiting = split_groups(self.waiting + self.unscored, self.open_groups(), self.dealer.group_size)
        scored = self.reward_calls.score(
            [episode.prompt for episode in finished],
            [episode.preds for episode in finished],
            [True] * len(finished),
            self.accepts_dropped,
        )
        self.env.failures.count(len(scored), sum(reward.has_failed for reward in scored))
        self.unscored, self.waiting = [], waiting  # only after the call of the reward, which may raise
        for episode, reward in zip(finished, scored, strict=True):
            # In place, since SB3's `ep_info_buffer` and the callbacks already hold these dicts.
            episode.info["episode"]["r"] += reward.value
            episode.info["reward_parts"].update(reward.parts)
            episode.info["scored"], episode.info["dropped"] = True, reward.is_dropped
            if not reward.is_dropped:
                self.dealer.observe(episode.prompt, episode.info["episode"]["r"])
        return [(episode.place, episode.info, reward.value) for episode, reward in zip(finished, scored, strict=True)]

    def _final_info(self, lane: int, end: EpisodeEnd) -> dict[str, Any]:
        episode = self.state.episodes[lane]
        figures = {"r": episode.reward, "l": int(self.state.generated[lane])}
        if self.autoreset:  # a single env has no "t": its infos are deterministic, and SB3's Monitor adds a "t" itself
            figures["t"] = round(time.monotonic() - self.start_time, 6)
        return final_info(episode.prompt, end.preds, end.reason, episode.parts, figures, scored=not self.defer_scores)

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the running episodes and the order of prompts: arrays, and a dict for JSON.

        Raises:
            RuntimeError: Before the first `reset`, or if finished episodes wait for `score_unscored`: save between
                rollouts.
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
        """Continue from a state that `state_dict` returned; return the observations, (B, L).

        Raises:
            ValueError: If the saved lanes differ in number or width, or their env in its prompts or their order.
        """
        if arrays["tokens"].shape != self.tokens.shape:
            raise ValueError(
                f"Expected running episodes of shape {self.tokens.shape} (lanes, width), got {arrays['tokens'].shape}: "
                "resume with the same n_envs, max_prompt_tokens and max_new_tokens."
            )
        self.dealer.load_state_dict(meta)  # first, since it refuses another env's prompts
        saved_prompts = zip(arrays["idle"], meta["prompts"], strict=True)
        prompts = [Prompt() if idle else load_prompt(self.env, saved) for idle, saved in saved_prompts]
        self.state = LaneState.load(arrays, meta, prompts)
        self.n_steps, self.reset_at = meta["n_steps"], meta["reset_at"]
        self.unscored.clear()
        self.waiting = [load_finished(self.env, state) for state in meta["waiting"]]
        return self.tokens.copy()
