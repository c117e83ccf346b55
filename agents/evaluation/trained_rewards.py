"""The returns on which a critic is trained, for texts outside a rollout: rewards, shaping, penalties, discount."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from textenv.env import TextEnv
from textenv.episodes.rules import EndReason

from ..models.sequences import SequenceBatch
from ..policies.lm_policy import LMPolicy
from ..rollout.before_returns import missing_steps
from ..rollout.buffer import SequenceRolloutBuffer
from ..steps.critic_warmup import CriticWarmup
from ..steps.kl_penalty import KLPenalty
from ..steps.reward_shaping import RewardShaping
from ..steps.scores import DropEpisodes
from ..steps.step import Order, text_vec_env
from .continuations import Continuations


@dataclass(frozen=True)
class TrainedRewards:
    """What makes rewards out of the scores of a model's env on their way to the critic.

    Attributes:
        policy: The model's policy.
        env: The env whose rewards they are.
        gamma: The discount of a token.
        normalizer: The `VecNormalize` of rewards, or None.
        shaping: The step that shapes scores, or None.
        penalty: The KL penalty, or None.
        drops_cut: Whether episodes that end at their limit are left out.
        micro_batch_tokens: The most tokens of one forward.
    """

    policy: LMPolicy
    env: TextEnv
    gamma: float
    normalizer: VecNormalize | None
    shaping: RewardShaping | None
    penalty: KLPenalty | None
    drops_cut: bool
    micro_batch_tokens: int | None

    @classmethod
    def of(cls, model: OnPolicyAlgorithm, env: TextEnv | None = None) -> TrainedRewards:
        """Return those of a model.

        Args:
            model: The model.
            env: Another env than the model's own.

        Raises:
            ValueError: If advantages need no critic, or a step is missing or not known here.
        """
        policy, normalizer, buffer = model.policy, model.get_vec_normalize_env(), model.rollout_buffer
        assert isinstance(policy, LMPolicy), "checked by the caller"
        steps = buffer.before_returns if isinstance(buffer, SequenceRolloutBuffer) else []
        if isinstance(buffer, SequenceRolloutBuffer):
            _check_steps(buffer)
        return cls(
            policy,
            text_vec_env(model.get_env()).env if env is None else env,
            model.gamma,
            normalizer if normalizer is not None and normalizer.norm_reward else None,
            next((step for step in steps if isinstance(step, RewardShaping)), None),
            next((step for step in steps if isinstance(step, KLPenalty)), None),
            any(isinstance(step, DropEpisodes) and step.cut for step in steps),
            buffer.micro_batch_tokens if isinstance(buffer, SequenceRolloutBuffer) else None,
        )

    def returns(self, texts: Continuations) -> np.ndarray:
        """Return the discounted return of each continuation from its prefix on, (B,); NaN if training leaves it out."""
        rewards = texts.rewards  # (S, B)
        if self.normalizer is not None:
            rewards = self.normalizer.normalize_reward(rewards)
        infos = [end.info for end in texts.ends]
        # SB3 `on_policy_algorithm.collect_rollouts` adds gamma * V to the last reward of a truncated episode.
        last = self.gamma * self._last_values(texts)  # (B,)
        if self.shaping is not None:
            last = last + self.shaping.changes(infos)
        if self.penalty is not None:
            batch, actions = texts.batch(self.policy.device, self.micro_batch_tokens)
            rewards = rewards.copy()
            rewards[texts.live] -= self.penalty.penalties(batch, actions, texts.log_probs[texts.live])
        discounts = self.gamma ** np.arange(len(rewards))  # (S,)
        n_steps = texts.live.sum(axis=0)  # (B,)
        returns = discounts @ (rewards * texts.live) + discounts[n_steps - 1] * last  # (B,)
        is_out = [info["dropped"] or (self.drops_cut and info["end_reason"] is EndReason.LENGTH) for info in infos]
        return np.where(is_out, np.nan, returns)

    def _last_values(self, texts: Continuations) -> np.ndarray:
        """Return the critic's value of the last observation of each truncated text, 0 for the others, (B,)."""
        values, rows = np.zeros(len(texts.ends)), np.flatnonzero(texts.truncated)
        if len(rows) > 0:
            observations = np.stack([texts.ends[row].observation for row in rows])  # (R, L)
            batch = SequenceBatch.from_observations(torch.as_tensor(observations, device=self.policy.device))
            lm = self.policy.lm
            values[rows] = lm.in_reward_units(lm.sequence_values(batch)).double().cpu().numpy()
        return values


def _check_steps(buffer: SequenceRolloutBuffer) -> None:
    """Raise ValueError if the steps of a model do not say which rewards its critic is trained on."""
    if buffer.advantage != "gae":
        raise ValueError(
            f"Expected a model with a critic, advantage='gae', got {buffer.advantage!r}, which needs no values."
        )
    if missing := missing_steps(buffer.expected_steps, buffer.before_returns):
        raise ValueError(
            f"Expected the steps {missing} that the model was trained with, got a model without: attach them, as in "
            "KLPenalty(0.02).attach(model)."
        )
    known = (RewardShaping, KLPenalty, CriticWarmup)
    unknown = [
        step.key for step in buffer.before_returns if step.order >= Order.SHAPING and not isinstance(step, known)
    ]
    if unknown:
        raise ValueError(
            f"Expected RewardShaping and KLPenalty alone to change rewards, got {unknown}: the reward of a text "
            "outside a rollout is unknown then."
        )
