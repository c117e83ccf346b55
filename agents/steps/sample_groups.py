"""The step that tells the buffer which episodes are samples of the same prompt."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from ..policies.flat import FlatLMPolicy
from ..rollout.advantages import GROUPED
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.dynamic_sampling import DynamicSampling
from ..rollout.ended_episodes import RolloutGroups
from .step import Order, RolloutStep, sequence_buffer, text_vec_env
from .without_critic import refuse_truncation


class SampleGroups(RolloutStep):
    """Trains the samples of one prompt together: an episode waits in the buffer until the last of its group has ended.

    It suits an env with `samples_per_prompt` of 2 or more; `make_agent` attaches it. The group-relative advantages of
    `SequenceRolloutBuffer` ("grpo", "grpo_mean", "rloo", "reinforce++_baseline") need it, and so do scores that compare
    the members of a group, which then reach all their tokens.

    With `min_groups`, groups whose scores are all equal, which have no advantages, are dropped, and the others wait
    until there are `min_groups` of them: the dynamic sampling of DAPO (Yu et al., 2025, arXiv 2503.14476, section 3.2).
    The updates of rollouts in between change nothing, so that all rollouts of a batch are by the same policy.
    `docs/losses.md` says what that does to counters, schedules and batches.

    Logged are `groups/signal` (the share of the groups that became whole in the rollout whose scores differ), and with
    `min_groups` the numbers of groups `groups/dropped` and `groups/trained` (0 while they wait), and
    `groups/extra_tokens`, the tokens of the dropped ones.

    A rollout in which no group becomes whole trains nothing: a warning says so, and its episodes wait for a later one.
    The algorithm runs its update all the same, which changes neither weights nor optimizer. TRPO alone, whose update
    cannot do without a step, raises.

    Args:
        min_groups: The number of groups with different scores, in all processes together, that are trained at once;
            None trains all groups that a rollout has made whole.
        max_rollouts: With `min_groups`, the number of rollouts after which those groups are trained that there are.

    Raises:
        ValueError: If a number is below 1. When attached, if the env has no groups, if the buffer does not wait for
            whole episodes, or if advantages without a critic are asked for and truncated episodes need one; with
            `min_groups`, if the advantage compares no samples, or the algorithm is TRPO.

    Example:
        >>> from agents import SampleGroups
        >>> callback = SampleGroups(min_groups=32)  # model.learn(100_000, callback=callback)
    """

    key = "SampleGroups"
    order = Order.GROUPS

    def __init__(self, min_groups: int | None = None, max_rollouts: int = 10, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.dynamic = DynamicSampling(min_groups, max_rollouts)

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
        refuse_truncation(env, buffer)
        if self.dynamic.min_groups is not None and isinstance(model.policy, FlatLMPolicy):
            raise ValueError("Expected PPO, MaskablePPO or A2C with min_groups, got TRPO, whose updates cannot wait.")
        compares = callable(buffer.advantage) or buffer.advantage in GROUPED  # a function may compare samples
        if self.dynamic.min_groups is not None and not compares:
            raise ValueError(
                "Expected an advantage within groups with min_groups, such as rollout_buffer_kwargs=dict(advantage="
                f"'grpo'), got {buffer.advantage!r}, which gives groups of equal scores a signal, too."
            )
        # `make_agent` has attached a step, which has taken the state from a checkpoint.
        earlier = [step for step in buffer.before_returns if isinstance(step, SampleGroups)]
        self.dynamic.n_rollouts = earlier[-1].dynamic.n_rollouts if earlier else 0
        self.env, self.algorithm = env, model
        # sb3-contrib `trpo.TRPO.train` divides by the step that it finds, and fails where there is none.
        self.can_wait = not isinstance(model.policy, FlatLMPolicy)

    def begin(self) -> None:
        """Have the env record the episodes of this rollout."""
        self.env.begin_rollout()  # scores and dropped episodes are the business of `LateScores` and `DropEpisodes`

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Give the buffer the groups of the rollout's episodes; rewards stay as they are."""
        lanes = self.env.lanes
        buffer.groups = RolloutGroups(
            self.env.record,
            lanes.open_groups(),
            lanes.dealer.group_size,
            lanes.reset_at,
            self.can_wait,
            self.dynamic,
            self._log,
        )

    def _log(self, name: str, value: float) -> None:
        self.algorithm.logger.record(f"groups/{name}", value)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the number of rollouts whose groups wait; the buffer keeps the groups themselves."""
        return {}, {"n_rollouts": self.dynamic.n_rollouts}

    def load_state_dict(self, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Restore the number that `state_dict` returned."""
        self.dynamic.n_rollouts = meta.get("n_rollouts", 0)  # none in checkpoints from before dynamic sampling
