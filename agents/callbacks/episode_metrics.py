"""The callback that logs each rollout's episodes: reward and its parts, length, end reasons, tokens per second."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from textenv.episodes.rules import EndReason
from textenv.episodes.scores import FAILURE

from ..models.prefix_cache import PrefixCache
from ..policies.lm_policy import LMPolicy
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.explained_variance import of_trained
from ..rollout.vec_env import TextVecEnv
from ..steps.step import remember
from .reward_time import RewardShare
from .scored_episodes import ScoredEpisodes
from .text_figures import TextFacts, TextFigures, text_figures


class EpisodeFacts(NamedTuple):
    """What the log needs of an episode, small enough to send to the other processes."""

    reward: float
    n_tokens: int
    end_reason: str
    parts: Mapping[str, float]
    is_dropped: bool
    text: TextFacts | None  # None without a `TextVecEnv`


class EpisodeMetrics(BaseCallback):
    """Logs, for each rollout, means over the episodes that ended in it, or whose late score came in it.

    In several processes these are the episodes of all. It logs these keys, which the README's table has, too:

    - `reward/task` and `reward/<part>`: the task reward and its named parts,
    - `episode/length`: the number of tokens that the policy wrote,
    - `episode/end_<reason>`: the share of each end reason, 0 to 1,
    - `episode/count` and `episode/reward_std`: the number of episodes, and the standard deviation of their task reward,
    - `text/blank`, `text/repetition`, `text/distinct`: the share of texts that are empty or white space, the mean share
      of a text's word pairs that it had before, and the number of different texts as a share of all,
    - `prompt/cut`, `prompt/plain`: the shares of episodes whose prompt was truncated, or, with a tokenizer that has a
      chat template, is no chat,
    - `prompt/largest_share`, `prompt/signal_share`: the largest share that one prompt has in the episodes, and in the
      sum of squared deviations of the task reward,
    - `time/tokens_per_second`: tokens per second since the end of the last rollout, the update included,
    - `time/reward_share`: the share of that time that the reward took, 0 to 1; only with a `TextVecEnv`,
    - `time/update_share`: the share of that time that the update took, 0 to 1,
    - `time/prefill_tokens` and `time/shared_tokens`: the tokens of prompts (and of texts that go on after an update)
      that the rollout has read, and those that it did not read, since a row with the same tokens had been; only where
      the policy decodes by a `PrefixCache`,
    - `episode/dropped`: the number of episodes that were dropped since their reward failed; no other figure has them,
    - `episode/failed`: the number of episodes that got a penalty since their reward failed (the part "failure"). These
      two keys are logged from the first such episode on,
    - `value/explained_variance_first`, `_middle` and `_last`: the share of the variance of the critic's targets that
      its values explain, for the tokens in each third of the texts that the coming update trains (see
      `rollout.explained_variance`). Texts that go on in the next rollout are left out, and a rollout that waits for
      further groups has none. Only with a `SequenceRolloutBuffer`; in several processes over the tokens of all.

    Example:
        >>> from agents import EpisodeMetrics
        >>> callback = EpisodeMetrics()  # model.learn(100_000, callback=callback)
    """

    key = "EpisodeMetrics"

    def __init__(self) -> None:
        super().__init__()
        self._has_failed = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"has_failed": self._has_failed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._has_failed = state["has_failed"]

    def _on_training_start(self) -> None:
        self._episodes = ScoredEpisodes(self.training_env)
        self._clock = time.perf_counter()
        self._timesteps = self.model.num_timesteps
        remember(self.model, self)  # checkpoints keep its state
        env = self.training_env.unwrapped
        self._rewards = RewardShare(env.lanes) if isinstance(env, TextVecEnv) else None
        self._texts = TextFigures(env.env) if isinstance(env, TextVecEnv) else None
        policy = self.model.policy
        cache = policy.lm.rollout_cache if isinstance(policy, LMPolicy) and policy.lm.use_cache else None
        self._cache = cache if isinstance(cache, PrefixCache) else None
        self._read_before = self._read_so_far()

    def _read_so_far(self) -> dict[str, int]:
        if self._cache is None:
            return {}
        return {name: getattr(self._cache, name) for name in ("prefill_tokens", "shared_tokens")}

    def _on_rollout_start(self) -> None:
        self._updated = time.perf_counter()

    def _on_step(self) -> bool:
        self._episodes.collect(self.locals["infos"])
        return True

    def _on_rollout_end(self) -> None:
        self._log_explained_variance()
        episodes = self._episodes.take(self._read)
        now = time.perf_counter()
        speed = (self.model.num_timesteps - self._timesteps) / (now - self._clock)
        self.logger.record("time/tokens_per_second", speed)
        # This callback comes before those that evaluate, sample and save when a rollout starts.
        self.logger.record("time/update_share", (self._updated - self._clock) / (now - self._clock))
        self._clock, self._timesteps = now, self.model.num_timesteps
        if self._rewards is not None:
            self.logger.record("time/reward_share", self._rewards.share)
            self._rewards = RewardShare(self._rewards.lanes)  # the next rollout's share starts here
        before, self._read_before = self._read_before, self._read_so_far()
        for name, n_tokens in self._read_before.items():
            self.logger.record(f"time/{name}", n_tokens - before[name])
        n_dropped = sum(episode.is_dropped for episode in episodes)
        # In a sum of rewards the part's name is `<reward>/failure`.
        n_failed = sum(any(name.split("/")[-1] == FAILURE for name in episode.parts) for episode in episodes)
        self._has_failed = self._has_failed or n_dropped + n_failed > 0
        if self._has_failed:
            self.logger.record("episode/dropped", n_dropped)
            self.logger.record("episode/failed", n_failed)
        if kept := [episode for episode in episodes if not episode.is_dropped]:
            self._log_means(kept)

    def _read(self, info: dict[str, Any]) -> EpisodeFacts:
        return EpisodeFacts(
            float(info["episode"]["r"]),
            int(info["episode"]["l"]),
            str(info["end_reason"]),
            {name: float(value) for name, value in info["reward_parts"].items()},
            bool(info["dropped"]),
            None if self._texts is None else self._texts.read(info),
        )

    def _log_means(self, episodes: Sequence[EpisodeFacts]) -> None:
        self.logger.record("reward/task", float(np.mean([episode.reward for episode in episodes])))
        self.logger.record("episode/length", float(np.mean([episode.n_tokens for episode in episodes])))
        texts = [episode.text for episode in episodes if episode.text is not None]
        for name, value in (text_figures(texts) if texts else {}).items():
            self.logger.record(name, value)
        parts: dict[str, float] = defaultdict(float)
        for episode in episodes:
            for name, value in episode.parts.items():
                parts[name] += value / len(episodes)
        for name, value in parts.items():
            self.logger.record(f"reward/{name}", value)
        ends = Counter(episode.end_reason for episode in episodes)
        for reason in EndReason:
            self.logger.record(f"episode/end_{reason}", ends[reason] / len(episodes))

    def _log_explained_variance(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        if isinstance(buffer, SequenceRolloutBuffer):
            for third, figure in of_trained(buffer.trained).items():
                self.logger.record(f"value/explained_variance_{third}", figure)
