"""The calls of an env's reward: checked, timed, and with `on_failure` applied to the rows whose reward fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from textenv.episodes.completion import Preds
from textenv.episodes.scores import (
    DROPPED,
    RAISED,
    Reward,
    RewardError,
    check_length,
    check_reward,
    check_rewards,
    describe,
)
from textenv.lanes.hooks import RewardHost
from textenv.prompts.prompts import Prompt


class RewardCalls:
    """The caller of an env's reward, which checks the rewards and measures the time.

    Args:
        env: The env; its `on_failure` decides what happens to rows without a reward.

    Attributes:
        seconds: The time that all calls together have taken, in seconds of wall clock.
    """

    def __init__(self, env: RewardHost) -> None:
        self.env = env
        self.seconds = 0.0

    def score(
        self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool], accepts_dropped: bool
    ) -> list[Reward]:
        """Return the checked rewards of rows; a row whose reward failed has `has_failed` and the reward of such rows.

        Args:
            prompts: The prompts of the rows.
            preds: Their completions.
            dones: Whether the episode of each row is over.
            accepts_dropped: Whether the caller can leave finished episodes out.

        Raises:
            RewardError: If the reward raises or returns no finite number while `on_failure` is "raise", or if it drops
                a row that must have a reward.
        """
        if not prompts:
            return []
        start = time.monotonic()
        try:
            if self.env.on_failure == "raise":
                rewards = check_rewards(self._ask(prompts, preds, dones), prompts, preds)
            else:
                rewards = self._score_apart(prompts, preds, dones)
        finally:
            self.seconds += time.monotonic() - start
        # A failed row may be dropped before its end, too: its episode is left out once it ends.
        for prompt, completion, done, reward in zip(prompts, preds, dones, rewards, strict=True):
            if reward.is_dropped and not ((done or reward.has_failed) and accepts_dropped):
                raise RewardError(
                    f"Expected a reward of every {'' if done else 'un'}finished row, got {DROPPED!r} "
                    f"({describe(prompt, completion)}). Finished episodes can be left out by a SequenceRolloutBuffer "
                    "with the step LateScores (score_at='rollout_end') or DropEpisodes, and by agents.evaluate; let "
                    "the reward return a number elsewhere (on_failure=0.0)."
                )
        return rewards

    def _ask(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> Any:
        try:
            return self.env.get_rewards(prompts, preds, dones)
        except RewardError:  # its message already names the row
            raise
        except RAISED as error:
            raise RewardError(
                f"`get_rewards` raised {type(error).__name__}: {error}, on {len(prompts)} rows, the first of them "
                f"{describe(prompts[0], preds[0])}."
            ) from error

    def _score_apart(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[Reward]:
        """Return the rewards of rows.

        All rows of a call that raises fail, and so does a row without a number. If the reward of a row does not
        depend on the other rows, each row has a call of its own.
        """
        n, failures = len(prompts), self.env.failures
        calls = [[row] for row in range(n)] if self.env.scores_rows_apart else [list(range(n))]
        causes: dict[int, Exception] = {}
        # At first every row has the reward of a failed row; the loop overwrites it for the rows that succeed.
        rewards = check_rewards([failures.instead] * n, prompts, preds)
        for rows in calls:
            try:
                values = self._ask(
                    [prompts[row] for row in rows], [preds[row] for row in rows], [dones[row] for row in rows]
                )
                check_length(values, len(rows))
            except RewardError as error:
                causes.update(dict.fromkeys(rows, error))
                continue
            for row, value in zip(rows, values, strict=True):
                try:
                    rewards[row] = check_reward(value, prompts[row], preds[row])
                except RewardError as error:
                    causes[row] = error
        if causes:
            failures.note("The reward", causes, prompts, preds, "")
        return [reward._replace(has_failed=row in causes) for row, reward in enumerate(rewards)]
