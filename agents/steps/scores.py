"""The steps that bring late scores to a finished rollout, and leave dropped episodes out of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from textenv.episodes.rules import EndReason
from textenv.lanes.finished_episodes import Place

from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.vec_env import TextVecEnv
from .step import Order, RolloutStep, text_vec_env


class LateScores(RolloutStep):
    """Scores all episodes that ended in a rollout in one call of the env's reward, at the rollout's end.

    It needs an env with `score_at="rollout_end"`: a heavy scorer then sees one large batch instead of a row or two per
    step. The score is added to the last transition of its episode, and `info["episode"]["r"]` and the logs are updated.
    With `samples_per_prompt` a group is scored when its last member has ended, which may be some rollouts later.
    Episodes that the reward drops are left out, as by `DropEpisodes`. Only with
    `rollout_buffer_kwargs=dict(complete_episodes=True)` does the score of an episode that began in an earlier rollout
    reach all its tokens.

    Raises:
        ValueError: When attached, if the env is no `TextVecEnv` with `score_at="rollout_end"`.

    Example:
        >>> from agents import LateScores
        >>> callback = LateScores()  # model.learn(100_000, callback=callback)
    """

    key = "LateScores"
    order = Order.SCORES

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that the env leaves scores to the end of a rollout."""
        env = text_vec_env(model.get_env())
        if env.env.score_at != "rollout_end":
            raise ValueError(f"Expected an env with score_at='rollout_end', got {env.env.score_at!r}.")
        self.env = env
        self.algorithm = model

    def begin(self) -> None:
        """Let finished episodes wait for their scores, and let the reward drop some."""
        self.env.begin_rollout(defer_scores=True, accept_dropped=True)

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Add each score to the reward of the transition that ended its episode.

        Raises:
            RuntimeError: If the env has groups of samples and the step `SampleGroups` is missing.
        """
        if self.env.env.samples_per_prompt > 1 and buffer.groups is None:
            raise RuntimeError(
                f"Expected the step SampleGroups with samples_per_prompt={self.env.env.samples_per_prompt}: pass it as "
                "a callback to learn(). A score may come after the rollout in which its episode ended."
            )
        unlogged = []
        for place, info, score in self.env.score_unscored():
            if info["dropped"]:
                drop_episode(buffer, self.env, place)
                unlogged.append(info)
                continue
            reward = final_reward(buffer, self.env, place)
            if reward is not None:
                reward += score  # a view, (1,): this writes into the buffer's rewards or the waiting episode's
            if place not in self.env.record.ended:  # an episode of an earlier rollout, which SB3 has not logged
                self._log(info)
        # Episodes that still wait for their scores would be logged with a reward of 0.
        unlogged += [episode.info for episode in self.env.lanes.waiting]
        remove_from_log(self.algorithm, unlogged)

    def _log(self, info: dict[str, Any]) -> None:
        """Have SB3 log an episode whose score has come in a later rollout."""
        assert self.algorithm.ep_info_buffer is not None
        self.algorithm.ep_info_buffer.append(info["episode"])


class DropEpisodes(RolloutStep):
    """Leaves out of training the episodes for which the reward returned `textenv.rewards.DROPPED` as they ended.

    It is for an env with `score_at="done"` or "step"; with "rollout_end", `LateScores` does the same. With `cut=True`,
    episodes that ended at their limit of tokens (end reason "length") are left out as well, at any `score_at`: the
    overlong filtering of DAPO (Yu et al., 2025, section 3.4). Their task reward stays in logs. None of the
    tokens of a dropped episode is trained, no mean of rewards or advantages includes it, and its group is compared
    without it. Tokens that an earlier rollout has trained stay trained; with
    `rollout_buffer_kwargs=dict(complete_episodes=True)` there are none. The divergence from a reference needs no score,
    so that its figures include dropped episodes.

    Example:
        >>> from agents import DropEpisodes
        >>> callback = DropEpisodes()  # model.learn(100_000, callback=callback)
    """

    key = "DropEpisodes"
    order = Order.SCORES

    def __init__(self, cut: bool = False, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.cut = cut

    def prepare(self, model: BaseAlgorithm) -> None:
        """Keep the model and its env."""
        self.env, self.algorithm = text_vec_env(model.get_env()), model

    def begin(self) -> None:
        """Let the reward drop episodes, and have the env record them."""
        self.env.begin_rollout(accept_dropped=True)

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Have the buffer leave the dropped episodes out."""
        ended = self.env.record.ended
        for place, info in ended.items():
            if info["dropped"] or (self.cut and info["end_reason"] is EndReason.LENGTH):
                drop_episode(buffer, self.env, place)
        remove_from_log(self.algorithm, [info for info in ended.values() if info["dropped"]])


def remove_from_log(algorithm: BaseAlgorithm, infos: Iterable[dict[str, Any]]) -> None:
    """Take episodes out of `rollout/ep_rew_mean` and `rollout/ep_len_mean`.

    SB3 `base_class._update_info_buffer` appends each info's `episode` to `ep_info_buffer` without a copy, so that
    entries can be found by `id`.
    """
    log, hidden = algorithm.ep_info_buffer, {id(info["episode"]) for info in infos}
    if log is not None and hidden:
        algorithm.ep_info_buffer = deque([entry for entry in log if id(entry) not in hidden], maxlen=log.maxlen)


def drop_episode(buffer: SequenceRolloutBuffer, env: TextVecEnv, place: Place) -> None:
    """Have the buffer leave out an episode that ended in this rollout, or earlier and waits for its group."""
    row = env.record.row_of(place)
    if row is not None:
        buffer.dropped.add((row, place[1]))
    elif place in buffer.waiting_episodes:
        buffer.waiting_episodes[place] = buffer.waiting_episodes[place]._replace(is_dropped=True)


def final_reward(buffer: SequenceRolloutBuffer, env: TextVecEnv, place: Place) -> np.ndarray | None:
    """Return the reward of the transition that ended an episode, (1,), to be changed in place; None if it is lost."""
    row, lane = env.record.row_of(place), place[1]
    if row is not None:
        return buffer.rewards[row : row + 1, lane]  # (1,), a view; an index alone would copy the number
    episode = buffer.waiting_episodes.get(place)
    return None if episode is None else episode.part.task_rewards[-1:]
