"""The array core: N episodes side by side. The environments for Gymnasium and Stable-Baselines3 are its front ends."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from textenv.completion import Preds, Turn
from textenv.dealing import PromptDealer
from textenv.episode import EndReason, ended_turns
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
from textenv.replies import encode_reply
from textenv.reward_calls import RewardCalls
from textenv.rewarding import describe
from textenv.tokenizer import decode_continuation

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
        turns = self._ended_turns(actions)
        ends = self._ended_episodes(turns)
        final_preds = {lane: self.preds(lane, turns[lane]) for lane in ends}
        infos: list[dict[str, Any]] = [{} for _ in range(self.n_lanes)]
        rewards, dropped = self._score(final_preds)
        terminated, truncated = np.zeros(self.n_lanes, dtype=bool), np.zeros(self.n_lanes, dtype=bool)
        final_observations = {}
        for lane, reason in sorted(ends.items()):
            cut = reason is EndReason.LENGTH and self.env.rules.length_limit == "truncate"
            terminated[lane], truncated[lane] = not cut, cut
            final_observations[lane] = self.state.tokens[lane].copy()
            episode = self.state.episodes[lane]
            infos[lane] = self._final_info(lane, reason, final_preds[lane]) | {"dropped": bool(dropped[lane])}
            if self.defer_scores:
                place = self.n_steps, lane
                self.unscored.append(FinishedEpisode(place, episode.prompt, final_preds[lane], infos[lane]))
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

    def _ended_turns(self, actions: np.ndarray) -> dict[int, EndReason]:
        turns = ended_turns(self.env.rules, actions, self.state.generated, self._turn_limits(), self._tail)
        return {lane: reason for lane, reason in turns.items() if not self.state.idle[lane]}

    def _turn_limits(self) -> np.ndarray:
        """Return how many tokens the policy will have written in each lane when its turn ends at the latest, (B,)."""
        state, turn_tokens = self.state, self.env.rules.turn_tokens
        if turn_tokens is None:
            return state.limits
        return state.generated - (state.lengths - state.turn_starts) + turn_tokens

    def most_new_tokens(self) -> np.ndarray:
        """Return how many tokens the policy may still write in the turn that each lane is in, (B,)."""
        return self._turn_limits() - self.state.generated

    def turn_limit(self, prompt: Prompt) -> int:
        """Return how many tokens the policy may write in the first turn after a prompt."""
        return self.env.rules.turn_tokens or prompt.max_new_tokens or self.env.rules.max_new_tokens

    def _ended_episodes(self, turns: dict[int, EndReason]) -> dict[int, EndReason]:
        """Return the lanes whose episode is over, and why; a turn that the env answers is not the end of one."""
        if not self.env.is_multi_turn:
            return turns
        rules = self.env.rules
        ends: dict[int, EndReason] = {}
        for lane, reason in turns.items():
            # The last token allowed leaves no room for another turn, however this one ended.
            is_last = self.state.generated[lane] >= self.state.limits[lane]
            n_turns = len(self.state.episodes[lane].turns) + 1
            if rules.turn_tokens is None and (is_last or n_turns >= rules.max_turns):
                ends[lane] = reason if is_last else EndReason.ENV
            elif (end := self._respond(lane, reason)) is not None:
                ends[lane] = end
        return ends

    def _tail(self, lane: int) -> str:
        """Return the last tokens of a lane's current turn as text, special tokens included."""
        tail = self.state.turn(lane, self.env.rules.tail_tokens).tolist()
        context = self.state.context(lane, int(self.state.lengths[lane]) - len(tail))
        return decode_continuation(self.env.tokenizer, context, tail, skip_special_tokens=False)

    def _respond(self, lane: int, reason: EndReason) -> EndReason | None:
        """Let the env answer a turn; return why the episode ends with it, or None where it goes on."""
        preds, prompt = self.preds(lane, reason), self.state.episodes[lane].prompt
        response = self.env.respond(prompt, preds)
        if response is None or response is EndReason.LENGTH:
            return EndReason.ENV if response is None else EndReason.LENGTH
        if not isinstance(response, str):
            raise TypeError(f"Expected `respond` to return a str or None, got {response!r:.80}.")
        rules = self.env.rules
        ids = encode_reply(self.env.tokenizer, prompt.messages, preds, response, self._tail(lane), rules.stop_strings)
        if rules.turn_tokens is not None:
            n_since = int(self.state.lengths[lane]) - (len(prompt.ids) + 1)  # turns and replies, behind the separator
            room = self.state.limits[lane] - n_since
            if len(ids) + rules.turn_tokens > room:
                return EndReason.LENGTH
        elif len(ids) > rules.max_response_tokens:
            raise ValueError(
                f"Expected a response of at most max_response_tokens={rules.max_response_tokens} tokens, got "
                f"{len(ids)} ({describe(prompt, preds)}): shorten it in `respond`, or raise the limit."
            )
        self.state.close_turn(lane, Turn(preds.turns[-1].text, response), preds.ids.tolist(), ids)
        return None

    def preds(self, lane: int, end_reason: EndReason | None = None) -> Preds:
        """Return a snapshot of what the policy has written in a lane."""
        episode, turn = self.state.episodes[lane], self.state.turn(lane)
        return Preds(
            self.env.tokenizer,
            np.concatenate([episode.written, turn]) if episode.turns else turn,
            context=self.state.context(lane, int(self.state.turn_starts[lane])),
            turn_length=len(turn),
            closed=episode.turns,
            end_reason=end_reason,
            stop_strings=self.env.rules.stop_strings,
            state=episode.state,
            lane=lane,
            group=episode.group,
        )

    def allowed(self) -> np.ndarray:
        """Return which tokens each lane may write next, (B, V) bool; all, where it is idle or its episode is over."""
        is_closed = (self.state.idle | self.state.over).tolist()
        prompts = self.prompts
        return self.masks.allowed(
            [None if closed else (prompts[lane], self.preds(lane)) for lane, closed in enumerate(is_closed)]
        )

    def _score(self, final_preds: Mapping[int, Preds]) -> tuple[np.ndarray, np.ndarray]:
        """Call the reward hook for the rows that want a score now; return rewards and which are dropped, each (B,)."""
        rewards, dropped = np.zeros(self.n_lanes, dtype=np.float64), np.zeros(self.n_lanes, dtype=bool)
        lanes, episodes = np.flatnonzero(~self.state.idle).tolist(), self.state.episodes
        if self.env.score_at != "step":
            lanes = [] if self.defer_scores else sorted(final_preds)
        scored = self.reward_calls.score(
            [episodes[lane].prompt for lane in lanes],
            [final_preds[lane] if lane in final_preds else self.preds(lane) for lane in lanes],
            [lane in final_preds for lane in lanes],
            self.accepts_dropped,
        )
        for lane, reward in zip(lanes, scored, strict=True):
            episode = episodes[lane]
            rewards[lane], episode.failed = reward.value, episode.failed or reward.has_failed
            dropped[lane] = reward.is_dropped or (episode.failed and self.env.on_failure == "drop")
            episode.reward += reward.value
            for name, part in reward.parts.items():
                episode.parts[name] = episode.parts.get(name, 0.0) + part
        if lanes and final_preds:
            self.env.failures.count(len(final_preds), sum(episodes[lane].failed for lane in final_preds))
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

    def _final_info(self, lane: int, reason: EndReason, preds: Preds) -> dict[str, Any]:
        episode = self.state.episodes[lane]
        figures = {"r": episode.reward, "l": int(self.state.generated[lane])}
        if self.autoreset:  # a lone env keeps to what is deterministic; SB3's Monitor adds its own clock
            figures["t"] = round(time.monotonic() - self.start_time, 6)
        return final_info(episode.prompt, preds, reason, episode.parts, figures, scored=not self.defer_scores)

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
