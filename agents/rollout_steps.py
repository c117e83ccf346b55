"""Steps that run on a finished rollout before returns are computed: the base, and late scores."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from .buffers import SequenceRolloutBuffer, step_name
from .vec_env import TextVecEnv


class RolloutStep(BaseCallback):
    """A callback that works on the rollout's rewards before returns are computed.

    Passed to `learn(callback=...)`, or attached with `attach(model)`, it stays with the model's buffer. A saved model
    remembers its name, and training raises until it is attached again.
    """

    first = False  # whether it goes before the steps already there

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
        buffer.before_returns = [self, *others] if self.first else [*others, self]
        buffer.before_rollout = [step.begin for step in buffer.before_returns if isinstance(step, RolloutStep)]
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
    Scores of episodes that began in an earlier rollout reach all their tokens with
    `rollout_buffer_kwargs=dict(complete_episodes=True)`.

    Example:
        >>> from agents import LateScores
        >>> callback = LateScores()  # model.learn(100_000, callback=callback)
    """

    first = True

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that the env leaves scores to the end of a rollout.

        Raises:
            ValueError: If the env is no `TextVecEnv` with `score_at="rollout_end"`.
        """
        env = text_vec_env(model.get_env())
        if env.env.score_at != "rollout_end":
            raise ValueError(f"Expected an env with score_at='rollout_end', got {env.env.score_at!r}.")
        self.env = env

    def begin(self) -> None:
        """Let finished episodes wait for their scores; forget those of a rollout that was broken off."""
        self.env.defer_scores(True)

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Add each score to the reward of the transition that ended its episode."""
        ends = np.concatenate([buffer.episode_starts[1:] > 0, buffer.dones[None]])  # (T, B)
        steps = [iter(np.flatnonzero(ends[:, lane])) for lane in range(buffer.n_envs)]
        for lane, score in self.env.score_unscored():
            buffer.rewards[next(steps[lane]), lane] += score


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
