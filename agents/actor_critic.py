"""A language model as actor and critic: backbone, value head, sampling and cache in one; no SB3 in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cache import PrefixCache
from .language_model import LanguageModel
from .sampling import TokenDistribution, score_tokens
from .sequences import Chunk, SequenceBatch, unpack_observations

MAX_LOGITS = 1 << 24  # of float32: 64 MiB
AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class LMActorCritic(nn.Module):
    """Samples the next token, values a prefix and scores whole sequences, all under one distribution.

    Args:
        backbone: The language model: a `Backbone`, or another module with the members of `LanguageModel`.
        critic: Maps hidden states (N, H) to values (N,).
        temperature: Divides the logits everywhere.
        autocast: "bfloat16" or "float16" runs the model in that type; weights, softmax and values stay float32.
        cache: Whether decoding reuses keys and values. The result is the same, the time is not.
    """

    def __init__(
        self,
        backbone: LanguageModel,
        critic: nn.Module,
        temperature: float = 1.0,
        autocast: str | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"Expected `temperature` above 0, got {temperature}; greedy is deterministic=True.")
        if autocast is not None and autocast not in AUTOCAST_DTYPES:
            raise ValueError(f"Expected `autocast` to be one of {[None, *AUTOCAST_DTYPES]}, got {autocast!r}.")
        self.backbone = backbone
        self.critic = critic
        self.temperature = temperature
        self.autocast = autocast
        self.use_cache = cache and backbone.is_cacheable
        # An evaluation inside a rollout must not evict the rollout's rows.
        self.rollout_cache = PrefixCache(backbone)
        self.predict_cache = PrefixCache(backbone)

    def drop_caches(self) -> None:
        """Forget all keys and values: the weights are about to change."""
        self.rollout_cache.drop()
        self.predict_cache.drop()

    def _apply(self, fn: Any, recurse: bool = True) -> LMActorCritic:
        """Move or cast the weights; keys and values of the old ones are dropped."""
        self.drop_caches()
        return super()._apply(fn, recurse)

    def act(
        self,
        observations: Tensor,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        cache: PrefixCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the next token of each row.

        Args:
            observations: (B, L); see `TextEnv`.
            deterministic: Take the most probable token.
            generator: The source of the sampling.
            cache: `rollout_cache`, `predict_cache` or None for a full forward.

        Returns:
            Actions (B,) int64, values (B,) and log-probabilities (B,).
        """
        hidden, logits = self._read_last(*unpack_observations(observations), cache)
        distribution = TokenDistribution(logits, self.temperature)
        actions = distribution.get_actions(deterministic, generator)
        return actions, self.critic(hidden), distribution.log_prob(actions)

    def values(self, observations: Tensor) -> Tensor:
        """Return the values of observations, (B,)."""
        ids, lengths = unpack_observations(observations)
        # The last observations of a rollout go on from its cache; terminal ones, of other rows, leave it alone.
        cache = self.rollout_cache if self.use_cache and self.rollout_cache.has_rows_of(ids, lengths) else None
        return self.critic(self._read_last(ids, lengths, cache)[0])

    def _read_last(self, ids: Tensor, lengths: Tensor, cache: PrefixCache | None) -> tuple[Tensor, Tensor]:
        with self._precision():
            # Keys and values are written in place, which a backward pass could not go through.
            if cache is not None and self.use_cache and not torch.is_grad_enabled():
                return cache.read(ids, lengths)
            lengths = lengths.clamp(min=1)
            rows = torch.arange(len(ids), device=ids.device)
            return self.backbone(ids[:, : int(lengths.max())], rows, lengths - 1)

    def evaluate(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score actions under the current weights, one forward a sequence.

        Args:
            batch: Sequences with N transitions.
            actions: The tokens taken, (N,).

        Returns:
            Values, log-probabilities and entropies, each (N,) float32.
        """
        parts, order = [], []
        for chunk in batch.chunks():
            taken = actions[torch.as_tensor(chunk.transitions, device=actions.device)]
            if batch.micro_batch_tokens is not None and torch.is_grad_enabled():
                parts.append(checkpoint(self._evaluate_chunk, chunk, taken, use_reentrant=False))
            else:
                parts.append(self._evaluate_chunk(chunk, taken))
            order.append(torch.as_tensor(chunk.transitions))
        inverse = torch.cat(order).argsort().to(actions.device)
        values, log_probs, entropies = (torch.cat(part)[inverse] for part in zip(*parts, strict=True))
        return values, log_probs, entropies

    def _evaluate_chunk(self, chunk: Chunk, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self._precision():
            hidden, logits = self.backbone.read(chunk.ids, chunk.rows, chunk.cols)
        return self.critic(hidden), *self._score(hidden, logits, actions)

    def _score(self, hidden: Tensor, logits: Tensor | None, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, (N,), without ever holding logits of all N where they are many."""
        if logits is not None:
            return score_tokens(logits, actions, self.temperature)
        n = max(1, MAX_LOGITS // self.backbone.vocab_size)
        if len(hidden) <= n:
            return self._score_rows(hidden, actions)
        parts = [
            # Logits are computed again in the backward: a head forward more, instead of several (N, V) tensors.
            checkpoint(self._score_rows, some, taken, use_reentrant=False)
            for some, taken in zip(hidden.split(n), actions.split(n), strict=True)
        ]
        log_probs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs, entropies

    def _score_rows(self, hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        with self._precision():
            logits = self.backbone.logits(hidden)
        return self._score(hidden, logits, actions)

    def _read_chunk(self, chunk: Chunk) -> tuple[Tensor, TokenDistribution]:
        with self._precision():
            hidden, logits = self.backbone(chunk.ids, chunk.rows, chunk.cols)
        return hidden, TokenDistribution(logits, self.temperature)

    def log_probs(self, batch: SequenceBatch, actions: Tensor) -> Tensor:
        """Return the log-probabilities of actions, (N,), in nats: what a reference model is asked for."""
        result = actions.new_zeros(len(actions), dtype=torch.float32)
        for chunk in batch.chunks():
            places = torch.as_tensor(chunk.transitions, device=actions.device)
            result[places] = self._evaluate_chunk(chunk, actions[places])[1]
        return result

    def distribution(self, batch: SequenceBatch) -> TokenDistribution:
        """Return the distributions of all transitions of a batch, as one of (N, V)."""
        logits, order = [], []
        for chunk in batch.chunks():
            logits.append(self._read_chunk(chunk)[1].log_probabilities)
            order.append(torch.as_tensor(chunk.transitions))
        return TokenDistribution(torch.cat(logits)[torch.cat(order).argsort().to(logits[0].device)])

    def sequence_values(self, batch: SequenceBatch) -> Tensor:
        """Return the values of all transitions of a batch, (N,)."""
        return self.evaluate(batch, torch.zeros(len(batch), dtype=torch.long, device=batch.tokens.device))[0]

    def _precision(self) -> torch.autocast:
        dtype = AUTOCAST_DTYPES.get(self.autocast or "", torch.bfloat16)
        return torch.autocast(self.backbone.device.type, dtype=dtype, enabled=self.autocast is not None)
