"""The base class of the steps that work on a finished rollout before returns are computed."""

from __future__ import annotations

from abc import abstractmethod
from enum import IntEnum
from typing import Any, ClassVar, Protocol

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from ..distributed.world import world
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.vec_env import TextVecEnv


class Order(IntEnum):
    """The order in which the steps of a rollout run; steps of the same order run as they were attached."""

    PROCESSES = 0  # first, since it measures the duration of the rollout without the other steps
    ENGINE = 1  # before all steps that read log-probabilities or values
    GROUPS = 2  # before late scores, some of which belong to episodes that waited for their group
    SCORES = 3
    SHAPING = 4  # changes scores, without the penalties
    PENALTIES = 5


class RolloutStep(BaseCallback):
    """A callback that changes the rollout's rewards before returns are computed.

    SB3 `on_policy_algorithm.collect_rollouts` computes returns before it calls `on_rollout_end`, which is therefore too
    late. `SequenceRolloutBuffer.compute_returns_and_advantage` runs the step instead.

    Passed to `learn(callback=...)`, or attached with `attach(model)`, a step stays with the model's buffer. It follows
    the model to another env (`set_env`), or refuses it when the next rollout begins. A saved model remembers the step's
    key, and training raises until a step with that key is attached again.

    Attributes:
        key: The step's name in saved models and checkpoints; a buffer keeps the last attached of steps with one key.
        order: The position of the step among the others.
        is_kept: Whether saved models and checkpoints keep the key, and require the step.

    Raises:
        TypeError: When a subclass is defined without `key`.

    Example:
        >>> from agents import RolloutStep
        >>> class Halved(RolloutStep):
        ...     key = "Halved"
        ...
        ...     def __call__(self, buffer):
        ...         buffer.rewards /= 2
        >>> callback = Halved()  # model.learn(100_000, callback=callback)
    """

    key: ClassVar[str] = ""
    order: ClassVar[Order] = Order.PENALTIES
    is_kept: ClassVar[bool] = True
    _attached_to: BaseAlgorithm
    _prepared_for: VecEnv | None  # the env that the model had when `prepare` was called last

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.key:
            raise TypeError(
                f'Expected a class constant `key` in {cls.__name__}, got none: set key = "{cls.__name__}". Checkpoints '
                "name the step by it, also after the class has been renamed."
            )

    def attach(self, model: BaseAlgorithm) -> None:
        """Put the step into the buffer's `before_returns`, in place of one with the same key.

        Raises:
            TypeError: If the model's buffer is not a `SequenceRolloutBuffer`.
        """
        buffer = sequence_buffer(model)
        self.prepare(model)
        self._attached_to, self._prepared_for = model, model.get_env()
        if self.key in buffer.saved_steps:
            self.load_state_dict(*buffer.saved_steps.pop(self.key))
        others = [step for step in buffer.before_returns if step.key != self.key]
        buffer.before_returns = sorted([*others, self], key=lambda step: step.order)
        if not self.is_kept:
            return
        buffer.expected_steps = [self.key, *(key for key in buffer.expected_steps if key != self.key)]
        # SB3 `base_class.save` stores every attribute of the model, and `load` passes `rollout_buffer_kwargs` to the
        # new buffer, which then knows the steps that are missing.
        model.rollout_buffer_kwargs = {  # type: ignore[attr-defined]
            **model.rollout_buffer_kwargs,  # type: ignore[attr-defined]
            "expected_steps": list(buffer.expected_steps),
        }

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that the step can work with the model, and take env and policy from it.

        Called when the step is attached, and again when a rollout begins on another env than the last (`set_env`).
        """

    def follow_env(self) -> bool:
        """Prepare the step anew if `set_env` has given its model another env; return whether it has.

        Raises:
            ValueError: If the step cannot work with the new env.
        """
        env = self._attached_to.get_env()
        if env is self._prepared_for:
            return False
        self.prepare(self._attached_to)
        self._prepared_for = env
        return True

    def begin(self) -> None:
        """Prepare for a rollout that begins; called by the buffer's `reset`, however the step was attached."""

    @abstractmethod
    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Change `buffer.rewards` or `buffer.penalties`, (T, B), in place; `buffer.view()` has the whole sequences."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state that checkpoints keep: tensors, and entries that fit JSON."""
        return {}, {}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""

    def _on_training_start(self) -> None:
        self.attach(self.model)

    def _on_step(self) -> bool:
        return True


class Remembering(Protocol):
    """A callback whose observations checkpoints keep; a resumed training does not require it.

    Attributes:
        key: The callback's name in checkpoints.
    """

    key: str

    def state_dict(self) -> dict[str, Any]:
        """Return the state that checkpoints keep, as entries that fit JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def remember(model: BaseAlgorithm, callback: Remembering) -> None:
    """Have checkpoints keep a callback's observations, and give it those of the checkpoint that was loaded.

    Nothing happens if the buffer is not a `SequenceRolloutBuffer`, without which there are no checkpoints.
    """
    buffer = model.rollout_buffer  # type: ignore[attr-defined]
    if isinstance(buffer, SequenceRolloutBuffer):
        buffer.remembering[callback.key] = callback
        if callback.key in buffer.remembered:
            callback.load_state_dict(buffer.remembered.pop(callback.key))


def sequence_buffer(model: BaseAlgorithm) -> SequenceRolloutBuffer:
    """Return the model's buffer.

    Raises:
        TypeError: If it is not a `SequenceRolloutBuffer`.
    """
    buffer = model.rollout_buffer  # type: ignore[attr-defined]
    if not isinstance(buffer, SequenceRolloutBuffer):
        raise TypeError(
            f"Expected rollout_buffer_class=SequenceRolloutBuffer, got {type(buffer).__name__}, which computes returns "
            "before anything else can touch the rewards."
        )
    return buffer


def tokens_of_rollout(model: BaseAlgorithm) -> int:
    """Return the number of tokens of a rollout, of all processes together."""
    here, own = world(), model.n_steps * model.n_envs  # type: ignore[attr-defined]
    return int(own) * (1 if here is None else here.size)


def text_vec_env(env: VecEnv | None) -> TextVecEnv:
    """Return the `TextVecEnv` inside SB3's wrappers.

    Raises:
        ValueError: If there is none.
    """
    inner = None if env is None else env.unwrapped
    if not isinstance(inner, TextVecEnv):
        raise ValueError(f"Expected the model to train on a TextVecEnv, got {type(inner).__name__}.")
    return inner
