"""The policy for MaskablePPO of sb3-contrib, which samples the tokens that the env's masks allow."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import Tensor

from ..models.sampling import TokenDistribution
from ..models.sequences import SequenceBatch
from ..models.token_sets import AllowedTokens, TokenSets
from .lm_policy import LMPolicy


class MaskableLMPolicy(LMPolicy):
    """`LMPolicy` for sb3-contrib's MaskablePPO: tokens are sampled and scored among those that the env's mask allows.

    A forbidden token has probability 0, and the others are normalised among themselves (Huang & Ontañón, 2022). A
    `MaskableSequenceRolloutBuffer` stores the allowed tokens with the sequences; the stock `MaskableRolloutBuffer`
    passes masks as `action_masks`. Arguments are those of `LMPolicy`.

    Raises:
        ValueError: If a mask allows no token, or its size is not that of the vocabulary.

    Example:
        >>> from agents import MaskableLMPolicy
        >>> from sb3_contrib import MaskablePPO
        >>> from textenv import CharTokenizer, TextEnv
        >>> from transformers import GPT2Config
        >>> vowels = lambda prompt, preds: CharTokenizer().encode("aeiou")
        >>> env = TextEnv(["a"], CharTokenizer(), reward=lambda *_: 0.0, max_new_tokens=4, mask=vowels)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40)
        >>> kwargs = dict(n_steps=8, batch_size=8, policy_kwargs=dict(lm=config), device="cpu")
        >>> model = MaskablePPO(MaskableLMPolicy, env, **kwargs)
        >>> observation, _ = env.reset(seed=0)
        >>> CharTokenizer().decode([int(model.predict(observation, action_masks=env.action_masks())[0])]) in "aeiou"
        True
    """

    # Set while `predict` runs: SB3 `policies.BasePolicy.predict` has no argument for it.
    _action_masks: np.ndarray | None = None
    _is_trained_masked = True  # unless the last rollout had no masks, as by MaskablePPO.learn(use_masking=False)
    _has_warned = False

    def forward(
        self, obs: Tensor, deterministic: bool = False, action_masks: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions (B,), values (B, 1) and log-probabilities (B,).

        Args:
            obs: (B, L).
            deterministic: Whether to take the most probable token.
            action_masks: (B, V), True where a token is allowed; None allows all.
        """
        self._is_trained_masked = action_masks is not None
        return self._step(obs, deterministic, self._allowed(action_masks, len(obs)))

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions for observations, (L,) or (B, L), under `action_masks`, (V,) or (B, V); None allows all.

        The first call without masks warns, unless training has none either.
        """
        if action_masks is None and self._is_trained_masked and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "Expected `action_masks` in `predict` of a model of MaskablePPO, got none: texts may have tokens that "
                "the env's mask forbids. stable_baselines3's evaluate_policy and EvalCallback do not use the mask: use "
                "evaluate_policy of sb3_contrib.common.maskable.evaluation, or MaskableEvalCallback of "
                "sb3_contrib.common.maskable.callbacks.",
                stacklevel=4,  # the caller of `evaluate_policy`, which calls `MaskablePPO.predict`
            )
        self._action_masks = action_masks
        try:
            return super().predict(observation, state, episode_start, deterministic)
        finally:
            self._action_masks = None

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        return self._choose(observation, deterministic, self._allowed(self._action_masks, len(observation)))

    def evaluate_actions(  # type: ignore[override]
        self, obs: Tensor | SequenceBatch, actions: Tensor, action_masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (N, 1), log-probabilities (N,) and entropies (N,) of actions (N,) under the current weights."""
        return super().evaluate_actions(self._with_masks(obs, action_masks), actions)

    def get_distribution(  # type: ignore[override]
        self, obs: Tensor | SequenceBatch, action_masks: np.ndarray | Tensor | None = None
    ) -> TokenDistribution:
        """Return the distribution over the next token."""
        return super().get_distribution(self._with_masks(obs, action_masks))

    def _with_masks(
        self, obs: Tensor | SequenceBatch, action_masks: np.ndarray | Tensor | None
    ) -> Tensor | SequenceBatch:
        """Return observations together with the stock buffer's masks; sequences carry their masks already."""
        if action_masks is None or isinstance(obs, SequenceBatch) or self.lm.sampling.has_support:
            return obs
        batch, sets = SequenceBatch.from_observations(obs), TokenSets(self.lm.backbone.vocab_size)
        allowed = self._read_masks(torch.as_tensor(action_masks).cpu().numpy(), len(batch))
        batch.allowed = AllowedTokens(sets, sets.add(allowed))
        return batch

    def _allowed(self, action_masks: np.ndarray | None, n_rows: int) -> Tensor | None:
        if action_masks is None:
            return None
        return torch.as_tensor(self._read_masks(action_masks, n_rows), device=self.device)

    def _read_masks(self, action_masks: np.ndarray, n_rows: int) -> np.ndarray:
        """Return masks as (B, V) bool, True where a token is allowed."""
        allowed, vocab_size = np.asarray(action_masks, dtype=bool), self.lm.backbone.vocab_size
        if allowed.size != n_rows * vocab_size:
            raise ValueError(f"Expected `action_masks` of shape ({n_rows}, {vocab_size}), got {allowed.shape}.")
        # sb3-contrib `maskable/utils.get_action_masks` returns (B, V), and one mask may be (V,).
        allowed = allowed.reshape(n_rows, vocab_size)  # (B, V)
        empty = np.flatnonzero(~allowed.any(axis=1))
        if len(empty) > 0:
            raise ValueError(f"Expected every row of `action_masks` to allow a token, got none in row {empty[0]}.")
        return allowed


# sb3-contrib `MaskablePPO._setup_model` checks for this class by `isinstance`. Inheriting from it would bring networks
# that a language model does not use.
MaskableActorCriticPolicy.register(MaskableLMPolicy)
