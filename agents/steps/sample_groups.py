"""The step that tells the buffer which episodes are samples of the same prompt."""

from __future__ import annotations

from stable_baselines3.common.base_class import BaseAlgorithm

from ..policies.flat import FlatLMPolicy
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.ended_episodes import RolloutGroups
from .step import Order, RolloutStep, sequence_buffer, text_vec_env


class SampleGroups(RolloutStep):
    """Trains the samples of one prompt together: an episode waits in the buffer until the last of its group has ended.

    It suits an env with `samples_per_prompt` of 2 or more; `make_agent` attaches it. The group-relative advantages of
    `SequenceRolloutBuffer(advantage="grpo" | "grpo_mean" | "rloo")` need it, and so do scores that compare the members
    of a group, which then reach all their tokens.

    A rollout in which no group becomes whole trains nothing: a warning says so, and its episodes wait for a later one.
    The algorithm runs its update all the same, which changes neither weights nor optimizer. TRPO alone, whose update
    cannot do without a step, raises.

    Raises:
        ValueError: When attached, if the env has no groups, if the buffer does not wait for whole episodes, or if
            advantages without a critic are asked for and truncated episodes need one.

    Example:
        >>> from agents import SampleGroups
        >>> callback = SampleGroups()  # model.learn(100_000, callback=callback)
    """

    key = "SampleGroups"
    order = Order.GROUPS

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that the env has groups, and that the buffer waits for whole episodes."""
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
        # sb3-contrib `trpo.TRPO.train` divides by the step that it finds, and fails where there is none.
        self.can_wait = not isinstance(model.policy, FlatLMPolicy)

    def begin(self) -> None:
        """Have the env record the episodes of this rollout."""
        self.env.begin_rollout()  # scores and dropped episodes are the business of `LateScores` and `DropEpisodes`

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Give the buffer the groups of the rollout's episodes; rewards stay as they are."""
        lanes = self.env.lanes
        buffer.groups = RolloutGroups(
            self.env.record, lanes.open_groups(), lanes.dealer.group_size, lanes.reset_at, self.can_wait
        )
