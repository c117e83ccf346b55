"""Groups of samples of one prompt: how the buffer learns which episodes belong together."""

from __future__ import annotations

from stable_baselines3.common.base_class import BaseAlgorithm

from .buffers import SequenceRolloutBuffer
from .rollout_steps import Order, RolloutStep, sequence_buffer, text_vec_env
from .waiting import RolloutGroups


class SampleGroups(RolloutStep):
    """Trains the samples of one prompt together: an episode waits in the buffer until the last of its group has ended.

    For an env with `samples_per_prompt` of 2 or more; `make_agent` attaches it. With it come the group-relative
    advantages of `SequenceRolloutBuffer(advantage="grpo" | "grpo_mean" | "rloo")`, and scores that compare the members
    of a group reach all their tokens.

    Example:
        >>> from agents import SampleGroups
        >>> callback = SampleGroups()  # model.learn(100_000, callback=callback)
    """

    key = "SampleGroups"
    order = Order.GROUPS

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that env and buffer can do it.

        Raises:
            ValueError: If the env has no groups, the buffer does not wait for whole episodes, or advantages that need
                no critic are asked of episodes whose truncation needs one.
        """
        env, buffer = text_vec_env(model.get_env()), sequence_buffer(model)
        if env.env.samples_per_prompt < 2:
            raise ValueError(
                f"Expected samples_per_prompt of 2 or more in the env, got {env.env.samples_per_prompt}: an episode is "
                "compared with others of its prompt."
            )
        if not buffer.complete_episodes:
            raise ValueError(
                "Expected rollout_buffer_kwargs=dict(complete_episodes=True), got False: groups of samples are trained "
                "when the last of them has ended."
            )
        if buffer.advantage != "gae" and env.env.rules.length_limit == "truncate":
            raise ValueError(
                f"Expected length_limit='terminate' with advantage={buffer.advantage!r}, got 'truncate', which adds "
                "the critic's value to the return of an episode."
            )
        self.env = env

    def begin(self) -> None:
        """Let the env keep what the episodes of this rollout are."""
        self.env.begin_rollout()

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Tell the buffer which groups the episodes belong to; rewards stay as they are."""
        lanes = self.env.lanes
        buffer.groups = RolloutGroups(self.env.record, lanes.open_groups(), lanes.dealer.group_size, lanes.reset_at)
