"""The callback that warns while a model trains: of each fault once, with its likely cause and a cure."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from textenv.episodes.rules import EndReason

from ..diagnosis.catalogue import CATALOGUE
from ..diagnosis.reward_rules import SLOW, SLOW_SECONDS
from ..distributed.collectives import gather
from ..policies.lm_policy import LMPolicy
from ..policies.rounding import tolerance
from ..rollout.buffer import SequenceRolloutBuffer
from ..steps.step import remember, sequence_buffer, text_vec_env
from .reward_time import RewardShare
from .scored_episodes import ScoredEpisodes

MIN_EPISODES = 32  # the fewest episodes for a warning about all of them; fewer wait for the next rollout's
N_SEQUENCES = 4  # sequences of a rollout that are read again before the update: enough for a systematic difference
NEGATIVE_KL = -1e-3  # nats per token; a divergence nearer to 0 is noise


class Ended(NamedTuple):
    """The parts of an ended episode that the warnings need; the reward of a dropped episode is None."""

    end_reason: str
    n_tokens: int
    reward: float | None

    @classmethod
    def of(cls, info: dict[str, Any]) -> Ended:
        """Return the ended episode that a final info describes."""
        reward = None if info["dropped"] else float(info["episode"]["r"])
        return cls(str(info["end_reason"]), info["episode"]["l"], reward)


class RolloutFigures(NamedTuple):
    """The figures of a rollout that the warnings look at, besides its episodes."""

    reward_share: float  # the share of the time that the reward takes
    reward_seconds: float
    divergence: float | None  # nats per token; None without a reference
    log_ratio: float  # the largest |log ratio| before the first step of the update, nats
    entropy: float  # nats per token

    @classmethod
    def merged(cls, of_ranks: Sequence[RolloutFigures]) -> RolloutFigures:
        """Return the figures of a rollout that processes have shared, of equally many tokens each."""
        slowest = max(of_ranks, key=lambda figures: figures.reward_share)
        divergences = [figures.divergence for figures in of_ranks if figures.divergence is not None]
        return cls(
            slowest.reward_share,
            slowest.reward_seconds,
            float(np.mean(divergences)) if divergences else None,
            max(figures.log_ratio for figures in of_ranks),
            float(np.mean([figures.entropy for figures in of_ranks])),
        )


class TrainingWarnings(BaseCallback):
    """Warns of faults that make training pointless or wrong, once per run (resumed or not), with cause and cure.

    At the end of each rollout, before its update, it looks for

    - equal rewards of all episodes, episodes that are all cut by length, or texts that are all empty ("all" means at
      least 32 episodes, of one rollout or several),
    - a divergence from the reference that is negative for several rollouts,
    - probability ratios other than 1 before the first step: rollout and update disagree about the sampled tokens,
    - a collapse of the entropy,
    - a reward that takes more than half of the time.

    Its words are those of the catalogue of `textenv doctor RUN` (docs/doctor.md). It logs `rollout/log_ratio`, the
    largest |log ratio| that it found, reads a few sequences once more and changes nothing. Its position in the list of
    callbacks does not matter. In several processes it looks at the episodes and figures of all.

    Args:
        entropy_fraction: The fraction of the first rollout's entropy below which it warns; the entropy is estimated by
            the mean of -log p of the sampled tokens.
        patience: The number of rollouts in a row with a negative divergence after which it warns.

    Raises:
        ValueError: If `entropy_fraction` is not between 0 and 1, or `patience` is below 1.
        TypeError: When training starts, if the model has no `SequenceRolloutBuffer`.

    Example:
        >>> from agents import TrainingWarnings
        >>> callback = TrainingWarnings()  # model.learn(100_000, callback=callback)
    """

    key = "TrainingWarnings"

    def __init__(self, entropy_fraction: float = 0.1, patience: int = 5) -> None:
        super().__init__()
        if not 0 < entropy_fraction < 1:
            raise ValueError(f"Expected `entropy_fraction` between 0 and 1, got {entropy_fraction}.")
        if patience < 1:
            raise ValueError(f"Expected `patience` to be at least 1, got {patience}.")
        self.entropy_fraction, self.patience = entropy_fraction, patience
        self._warned_of: set[str] = set()
        self._first_entropy: float | None = None
        self._divergences: deque[float] = deque(maxlen=patience)
        self._recent: list[Ended] = []  # episodes that were not examined yet: fewer than `MIN_EPISODES`

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, so that a resumed run warns like an uninterrupted one."""
        return {
            "given": sorted(self._warned_of),
            "first_entropy": self._first_entropy,
            "divergences": list(self._divergences),
            "recent": [list(episode) for episode in self._recent],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._warned_of, self._first_entropy = set(state["given"]), state["first_entropy"]
        self._divergences = deque(state["divergences"], maxlen=self.patience)
        self._recent = [Ended(*episode) for episode in state["recent"]]

    def _on_training_start(self) -> None:
        sequence_buffer(self.model)  # raises for any other buffer
        env = text_vec_env(self.model.get_env())
        self._rules, self._rewards = env.env.rules, RewardShare(env.lanes)
        self._episodes = ScoredEpisodes(self.training_env)
        remember(self.model, self)  # checkpoints keep its state

    def _on_step(self) -> bool:
        self._episodes.collect(self.locals["infos"])
        return True

    def _on_rollout_end(self) -> None:
        buffer = sequence_buffer(self.model)
        self._recent += self._episodes.take(Ended.of)
        if len(self._recent) >= MIN_EPISODES:
            self._look_at_rewards([episode.reward for episode in self._recent if episode.reward is not None])
            self._look_at_ends(self._recent)
            self._recent = []
        own = RolloutFigures(
            self._rewards.share,
            self._rewards.seconds,
            # `KLPenalty` recorded it when the buffer computed its returns, which SB3
            # `on_policy_algorithm.collect_rollouts` does before it calls `on_rollout_end`.
            self.logger.name_to_value.get("kl/token"),
            _largest_log_ratio(cast("LMPolicy", self.model.policy), buffer),
            -float(buffer.log_probs.mean()),
        )
        figures = RolloutFigures.merged(gather("the figures of a rollout", own))
        self._look_at_time(figures)
        self._look_at_divergence(figures.divergence)
        self._look_at_ratios(figures.log_ratio)
        self._look_at_entropy(figures.entropy)

    def _look_at_rewards(self, rewards: list[float]) -> None:
        if rewards and min(rewards) == max(rewards):
            self._warn("constant-reward", f"all {len(rewards)} last episodes earned {rewards[0]:.4g}")

    def _look_at_ends(self, episodes: list[Ended]) -> None:
        n, rules = len(episodes), self._rules
        can_stop = bool(rules.stop_ids or rules.stop_strings)
        if can_stop and all(episode.end_reason == EndReason.LENGTH for episode in episodes):
            limits = f"stop_ids={list(rules.stop_ids)} and max_new_tokens={rules.max_new_tokens}"
            self._warn("never-stops", f"all {n} last episodes were cut by length, with {limits}")
        if all(episode.end_reason == EndReason.EOS and episode.n_tokens == 1 for episode in episodes):
            self._warn("empty-texts", f"all {n} last episodes are an end token and nothing else")

    def _look_at_time(self, figures: RolloutFigures) -> None:
        share, seconds = figures.reward_share, figures.reward_seconds
        if share > SLOW and seconds > SLOW_SECONDS:
            self._warn("reward-slow", f"the reward takes {share:.0%} of the time, {seconds:.0f} s so far")

    def _look_at_divergence(self, value: float | None) -> None:
        if value is None:
            return
        self._divergences.append(value)
        if len(self._divergences) == self.patience and max(self._divergences) < NEGATIVE_KL:
            seen = f"it is below 0 for {self.patience} rollouts, last {value:.3g} nats a token"
            self._warn("kl-negative", seen)

    def _look_at_ratios(self, off: float) -> None:
        limit = tolerance(cast("LMPolicy", self.model.policy).lm)  # nats
        self.logger.record("rollout/log_ratio", off)
        if not off <= limit:  # also true for NaN
            seen = f"before the first step of an update its log-ratio is {off:.3g}; up to {limit:.0e} is rounding"
            self._warn("rollout-update-mismatch", seen)

    def _look_at_entropy(self, entropy: float) -> None:
        if self._first_entropy is None:
            self._first_entropy = entropy
        if entropy < self.entropy_fraction * self._first_entropy:
            self._warn("entropy-collapse", f"it fell from {self._first_entropy:.3g} to {entropy:.3g} nats a token")

    def _warn(self, cause_id: str, evidence: str) -> None:
        if cause_id not in self._warned_of:
            self._warned_of.add(cause_id)
            cause = CATALOGUE[cause_id]
            seen = f"{cause.title[0].upper()}{cause.title[1:]}: {evidence}. {cause.why} {cause.cure}"
            warnings.warn(f"After {self.model.num_timesteps} tokens: {seen}", stacklevel=2)


@torch.no_grad()
def _largest_log_ratio(policy: LMPolicy, buffer: SequenceRolloutBuffer) -> float:
    """Return the largest |log ratio| over a few sequences of the rollout, evaluated as the update will do it."""
    view = buffer.view()
    n = len(view.batch.lengths)
    # Evenly spread over the rollout: the first, the last, and some between.
    batch, transitions = view.batch.of_sequences(np.linspace(0, n - 1, min(N_SEQUENCES, n)).astype(int))
    was_training = policy.training
    policy.train(True)  # the update's mode; `set_training_mode` would also drop the rollout's cached rows
    actions = view.actions[torch.as_tensor(transitions, device=view.actions.device)]  # (n,)
    now = policy.evaluate_actions(batch, actions)[1]  # (n,)
    policy.train(was_training)
    before = buffer.log_probs[view.steps[transitions], view.lanes[transitions]]  # (n,)
    difference = np.abs(now.cpu().numpy() - before)
    return float(np.where(np.isnan(difference), np.inf, difference).max())
