"""Steps that run on a finished rollout before returns are computed: the base, late scores, and episodes left out."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from textenv.finished import Place

from .buffers import SequenceRolloutBuffer, step_name
from .vec_env import TextVecEnv


class RolloutStep(BaseCallback):
    """A callback that works on the rollout's rewards before returns are computed.

    Passed to `learn(callback=...)`, or attached with `attach(model)`, it stays with the model's buffer. A saved model
    remembers its name, and training raises until it is attached again.
    """

    rank = 3  # 0 groups, 1 scores, 2 their shaping, 3 penalties: lower ones run first, equal ones as attached
    is_kept = True  # whether saved models and checkpoints know it, and ask for it

    def attach(self, model: BaseAlgorithm) -> None:
        """Put the step into the buffer's `before_returns`, in place of one of the same name.

        Raises:
            TypeError: If the model's buffer is not a `SequenceRolloutBuffer`.
        """
        buffer = sequence_buffer(model)
        self.prepare(model)
        name = step_name(self)
        if name in buffer.saved_steps:
            self.load_state_dict(*buffer.saved_steps.pop(name))
        others = [step for step in buffer.before_returns if step_name(step) != name]
        last = RolloutStep.rank  # of a plain function
        buffer.before_returns = sorted(
            [*others, self], key=lambda step: step.rank if isinstance(step, RolloutStep) else last
        )
        buffer.before_rollout = [step.begin for step in buffer.before_returns if isinstance(step, RolloutStep)]
        if not self.is_kept:
            return
        buffer.expected_steps = [name, *(other for other in buffer.expected_steps if other != name)]
        # What SB3 stores with the model, so that a loaded one knows what is missing.
        model.rollout_buffer_kwargs = {  # type: ignore[attr-defined]
            **model.rollout_buffer_kwargs,  # type: ignore[attr-defined]
            "expected_steps": list(buffer.expected_steps),
        }

    def prepare(self, model: BaseAlgorithm) -> None:
        """Take what is needed from the model, once, when the step is attached."""

    def begin(self) -> None:
        """Called when a rollout begins, also where the step is attached and no callback."""

    @abstractmethod
    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Change `buffer.rewards`, (T, B), in place; `buffer.view()` gives the rollout as sequences."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what a checkpoint keeps: tensors, and what goes into JSON."""
        return {}, {}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""

    def _on_training_start(self) -> None:
        self.attach(self.model)

    def _on_step(self) -> bool:
        return True


class LateScores(RolloutStep):
    """Scores all episodes that ended in a rollout in one call of the env's reward, at the rollout's end.

    For an env with `score_at="rollout_end"`: a heavy scorer sees one large batch instead of a row or two a step. The
    score lands on the last transition of its episode; `info["episode"]["r"]` and the logs are brought up to date.
    With `samples_per_prompt` a group is scored when its last member has ended, maybe some rollouts later. Episodes that
    the reward drops are left out, as by `DropEpisodes`.
    Scores of episodes that began in an earlier rollout reach all their tokens with
    `rollout_buffer_kwargs=dict(complete_episodes=True)`.

    Example:
        >>> from agents import LateScores
        >>> callback = LateScores()  # model.learn(100_000, callback=callback)
    """

    rank = 1

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that the env leaves scores to the end of a rollout.

        Raises:
            ValueError: If the env is no `TextVecEnv` with `score_at="rollout_end"`.
        """
        env = text_vec_env(model.get_env())
        if env.env.score_at != "rollout_end":
            raise ValueError(f"Expected an env with score_at='rollout_end', got {env.env.score_at!r}.")
        self.env = env
        self.algorithm = model

    def begin(self) -> None:
        """Let finished episodes wait for their scores; forget those of a rollout that was broken off."""
        self.env.begin_rollout()
        self.env.defer_scores()
        self.env.accept_dropped()

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
                reward += score
            if place not in self.env.ended:
                self._log(info)
        # What has no score yet would count as 0.
        unlogged += [episode.info for episode in self.env.lanes.waiting]
        keep_from_log(self.algorithm, unlogged)

    def _log(self, info: dict[str, Any]) -> None:
        """Let SB3 log an episode whose score has come in a later rollout."""
        assert self.algorithm.ep_info_buffer is not None
        self.algorithm.ep_info_buffer.append(info["episode"])


class DropEpisodes(RolloutStep):
    """Leaves out of training the episodes for which the reward returned `textenv.rewards.DROPPED` as they ended.

    For an env with `score_at="done"` or "step"; `LateScores` does the same for its own. None of their tokens is trained
    on, and no mean of rewards or advantages has them; a group goes on without. Tokens that were trained in an earlier
    rollout stay so: with `rollout_buffer_kwargs=dict(complete_episodes=True)` there are none. The divergence from a
    reference needs no score, and is measured and logged with them.

    Example:
        >>> from agents.rollout_steps import DropEpisodes
        >>> callback = DropEpisodes()  # model.learn(100_000, callback=callback)
    """

    rank = 1

    def prepare(self, model: BaseAlgorithm) -> None:
        """Take env and log from the model."""
        self.env, self.algorithm = text_vec_env(model.get_env()), model

    def begin(self) -> None:
        """Let the reward drop episodes, and the env keep what they are."""
        self.env.begin_rollout()
        self.env.accept_dropped()

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Tell the buffer which episodes are left out."""
        dropped = {place: info for place, info in self.env.ended.items() if info["dropped"]}
        for place in dropped:
            drop_episode(buffer, self.env, place)
        keep_from_log(self.algorithm, dropped.values())


def keep_from_log(algorithm: BaseAlgorithm, infos: Iterable[dict[str, Any]]) -> None:
    """Take episodes out of SB3's log, whose means they would be in."""
    log, hidden = algorithm.ep_info_buffer, {id(info["episode"]) for info in infos}
    if log is not None and hidden:
        algorithm.ep_info_buffer = deque([one for one in log if id(one) not in hidden], maxlen=log.maxlen)


def drop_episode(buffer: SequenceRolloutBuffer, env: TextVecEnv, place: Place) -> None:
    """Have the buffer leave out an episode that ended in this rollout, or waits for its group since an earlier one."""
    step, lane = place
    if step >= env.first_step:
        buffer.dropped.add((step - env.first_step, lane))
    elif place in buffer.waiting_episodes:
        buffer.waiting_episodes[place] = buffer.waiting_episodes[place]._replace(is_dropped=True)


def final_reward(buffer: SequenceRolloutBuffer, env: TextVecEnv, place: Place) -> np.ndarray | None:
    """Return the reward of the transition that ended an episode, (1,), to be changed in place; None if it is lost."""
    step, lane = place
    if step >= env.first_step:
        row = step - env.first_step
        return buffer.rewards[row : row + 1, lane]
    episode = buffer.waiting_episodes.get(place)
    return None if episode is None else episode.part.rewards[-1:]


class Remembering(Protocol):
    """A callback of which checkpoints keep what it has seen; training goes on without it, too."""

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


def remember(model: BaseAlgorithm, callback: Remembering) -> None:
    """Have checkpoints keep what a callback has seen; give it what the one that was loaded has kept.

    Models with another buffer than a `SequenceRolloutBuffer` have no checkpoints.
    """
    buffer, name = model.rollout_buffer, step_name(callback)  # type: ignore[attr-defined]
    if isinstance(buffer, SequenceRolloutBuffer):
        buffer.remembering[name] = callback
        if name in buffer.remembered:
            callback.load_state_dict(buffer.remembered.pop(name))


def sequence_buffer(model: BaseAlgorithm) -> SequenceRolloutBuffer:
    """Return the model's buffer, which must be a `SequenceRolloutBuffer`."""
    buffer = model.rollout_buffer  # type: ignore[attr-defined]
    if not isinstance(buffer, SequenceRolloutBuffer):
        raise TypeError(
            f"Expected rollout_buffer_class=SequenceRolloutBuffer, got {type(buffer).__name__}, which computes returns "
            "before anything else can touch the rewards."
        )
    return buffer


def text_vec_env(env: VecEnv | None) -> TextVecEnv:
    """Return the `TextVecEnv` inside SB3's wrappers."""
    inner = None if env is None else env.unwrapped
    if not isinstance(inner, TextVecEnv):
        raise ValueError(f"Expected the model to train on a TextVecEnv, got {type(inner).__name__}.")
    return inner
