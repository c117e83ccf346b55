"""The step that keeps a critic's values out of advantages that need no critic."""

from __future__ import annotations

from typing import ClassVar

from stable_baselines3.common.base_class import BaseAlgorithm

from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.vec_env import TextVecEnv
from .step import Order, RolloutStep, sequence_buffer, text_vec_env


def refuse_truncation(env: TextVecEnv, buffer: SequenceRolloutBuffer) -> None:
    """Raise a ValueError if advantages without a critic would include its value at the end of truncated episodes."""
    # SB3 `on_policy_algorithm.collect_rollouts` adds the value to the reward of the last token.
    if buffer.advantage != "gae" and env.env.rules.length_limit == "truncate":
        raise ValueError(
            f"Expected length_limit='terminate' with advantage={buffer.advantage!r}, got 'truncate', which adds "
            "the critic's value to the return of an episode."
        )


class WithoutCritic(RolloutStep):
    """Refuses an env that truncates episodes, also one that `set_env` brings later.

    `make_agent` attaches it with advantages that neither have a critic nor compare samples: "reinforce++", or a
    function of one's own. `SampleGroups` refuses the same for the others. The step changes nothing, and a saved model
    does not require it.

    Raises:
        ValueError: When attached, or when a rollout begins on another env, if that env truncates episodes.

    Example:
        >>> from agents.steps.without_critic import WithoutCritic
        >>> callback = WithoutCritic()  # for a model built by hand: model.learn(100_000, callback=callback)
    """

    key = "WithoutCritic"
    order: ClassVar[Order] = Order.PROCESSES
    is_kept = False

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that the env ends episodes at their limit."""
        refuse_truncation(text_vec_env(model.get_env()), sequence_buffer(model))

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Change nothing: the check was made when the rollout began."""
