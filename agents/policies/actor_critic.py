"""The language model as actor and critic: backbone, critic, sampling and caches, without SB3."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..distributed.sharding import Shards
from ..models.backbone import Backbone
from ..models.critic import TrunkCritic, ValueHead
from ..models.interface import LanguageModel, RowCache, SequenceScorer
from ..models.observations import has_begun, prompt_lengths, unpack_observations
from ..models.sampling import Sampling, TokenDistribution, score_tokens
from ..models.sequences import Chunk, PartReader, SequenceBatch
from .lagged_copy import LaggedCopy
from .out_of_memory import evaluate_in_memory
from .value_norm import ValueNorm

MAX_LOGITS = 1 << 24  # numbers of float32 in one tensor of logits: 64 MiB
AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Step(NamedTuple):
    """The result of a step of B rows."""

    actions: Tensor  # (B,) int64
    values: Tensor  # (B,) in units of reward
    log_probs: Tensor  # (B,) in nats
    allowed: Tensor | None  # (B, V) bool: the tokens that could be sampled; None for all tokens


class LMActorCritic(SequenceScorer):
    """Samples the next token, values a prefix and scores whole sequences, all under one distribution.

    Args:
        backbone: The language model: a `Backbone`, or another module with the members of `LanguageModel`.
        critic: Maps the backbone's hidden states (N, H) to values (N,), or has a trunk of its own (`TrunkCritic`).
        sampling: The settings by which logits become the distribution over the next token.
        autocast: "bfloat16" or "float16" runs the model in that type; weights, softmax and values stay float32.
        cache: Whether decoding reuses keys and values: the same result in less time.
        value_norm: "norm" or "popart": the critic predicts returns in units of their deviation; see `ValueNorm`.

    Attributes:
        most_tokens: The most tokens that an update reads in one forward, set by an out-of-memory error; None before.
        shards: The weights if they are spread over processes, else None.
        may_share_prompts: Whether sequences may share equal prompts: False only in tests, which compare.

    Raises:
        ValueError: For an unknown `autocast`, or `value_norm` with a critic that does not end in a `ValueHead`.
    """

    lagged: LaggedCopy | None
    value_norm: ValueNorm | None
    may_share_prompts = True

    def __init__(
        self,
        backbone: LanguageModel,
        critic: nn.Module,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        autocast: str | None = None,
        cache: bool = True,
        value_norm: str | None = None,
    ) -> None:
        super().__init__()
        if autocast is not None and autocast not in AUTOCAST_DTYPES:
            raise ValueError(f"Expected `autocast` to be one of {[None, *AUTOCAST_DTYPES]}, got {autocast!r}.")
        self.backbone = backbone
        self.critic = critic
        if value_norm is not None and not isinstance(critic, ValueHead):
            raise ValueError(f"Expected a critic that ends in a ValueHead for `value_norm`, got {type(critic)}.")
        self.value_norm = None if value_norm is None else ValueNorm(value_norm)
        self._defers_values = False  # see `defer_values`
        self.most_tokens: int | None = None
        self.sampling = sampling
        self.autocast = autocast
        # Two caches: an evaluation inside a rollout must not evict the rollout's rows.
        self.rollout_cache, self.predict_cache = backbone.new_cache(), backbone.new_cache()
        self.use_cache = cache and self.rollout_cache is not None
        self.shards: Shards[LMActorCritic] | None = None
        self.lagged = None if sampling.top_p_lag is None else LaggedCopy(backbone, sampling.top_p_lag)

    def drop_caches(self) -> None:
        """Forget the keys and values of all rows: the weights are about to change."""
        for cache in (self.rollout_cache, self.predict_cache):
            if cache is not None:
                cache.drop()
        if self.lagged is not None:
            self.lagged.drop_caches()

    def begin_update(self) -> None:
        """Count an update that begins, for the lagged copy."""
        if self.lagged is not None:
            self.lagged.count_update(self.backbone)

    def defer_values(self) -> None:
        """Have `act` return zeros as values from now on, if the critic has a trunk of its own.

        `SequenceRolloutBuffer` calls it, and computes the values of whole sequences when the rollout ends, in one
        forward each.
        """
        self._defers_values = isinstance(self.critic, TrunkCritic)

    def settle_values(self) -> bool:
        """Have `act` compute values again; return whether the steps so far have zeros in place of values."""
        was_deferred, self._defers_values = self._defers_values, False
        return was_deferred

    def _apply(self, fn: Any, recurse: bool = True) -> LMActorCritic:
        """Move or cast the weights, unless they are sharded, and drop all cached keys and values."""
        self.drop_caches()
        return self if self.shards is not None else super()._apply(fn, recurse)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states (N, H) and logits (N, V) of the language model, given the arguments of its `read`."""
        return self.backbone(*inputs)

    def act(
        self,
        observations: Tensor,
        deterministic: bool = False,
        generator: torch.Generator | Tensor | None = None,
        cache: RowCache | None = None,
        allowed: Tensor | None = None,
        with_values: bool = True,
    ) -> Step:
        """Choose the next token of each of B rows.

        Args:
            observations: (B, L); see `TextEnv`.
            deterministic: Whether to take the most probable token.
            generator: The source of the randomness, or uniform numbers, (B, 1); None for torch's own generator.
            cache: `rollout_cache`, `predict_cache` or None for a full forward.
            allowed: The env's mask, (B, V) bool; None allows all.
            with_values: Whether a critic with a trunk of its own is run; if not, its values are zeros.
        """
        row = self._unpack(observations)
        ids, lengths = row[:2]  # (B, L - 1), (B,)
        hidden, logits = self._read_last(self.backbone, row, cache)  # (B, H), (B, V)
        logits = self.sampling.adjust(logits, lambda: ids, lengths)
        support = self.sampling.support(logits, allowed, self._lagged_logits(row, cache))
        distribution = TokenDistribution(logits, support)
        actions = distribution.get_actions(deterministic, generator)
        log_probs = distribution.log_prob(actions)
        if not isinstance(self.critic, TrunkCritic):
            values = self.in_reward_units(self.critic(hidden))
        elif with_values and not self._defers_values:
            values = self._trunk_values(ids, lengths)
        else:
            values = torch.zeros_like(log_probs)
        return Step(actions, values, log_probs, support)

    @torch.no_grad()
    def _lagged_logits(self, row: tuple[Tensor, ...], cache: RowCache | None) -> Tensor | None:
        if self.lagged is None:
            return None
        lagged_cache = self.lagged.rollout_cache if cache is self.rollout_cache else self.lagged.predict_cache
        logits = self._read_last(self.lagged.backbone, row, lagged_cache)[1]
        return self.sampling.adjust(logits, lambda: row[0], row[1])

    def values(self, observations: Tensor, only_begun: bool = False) -> Tensor:
        """Return the values of observations (B, L), (B,), in units of reward.

        Args:
            observations: (B, L); see `TextEnv`.
            only_begun: Whether observations without a token behind the prompt are not read, and get 0.
        """
        row = self._unpack(observations)
        if not only_begun:
            return self._row_values(row, self._cache_of(row))
        is_read = has_begun(observations)  # (B,)
        # Rows stay in the cache's batch: of a row of no token it reads next to nothing.
        counted = (row[0], *(counts * is_read for counts in row[1:]))
        if (cache := self._cache_of(counted)) is not None:
            return torch.where(is_read, self._row_values(counted, cache), 0.0)
        values = torch.zeros(len(is_read), device=is_read.device)
        read = is_read.nonzero()[:, 0]  # (R,)
        if len(read) > 0:
            values[read] = self._row_values(tuple(part[read] for part in row), None).to(values.dtype)
        return values

    def _cache_of(self, row: tuple[Tensor, ...]) -> RowCache | None:
        """Return the rollout's cache if it has the rows, as it has a rollout's last observations; else None.

        Terminal observations belong to other rows: read by the cache, they would evict the lanes' rows.
        """
        cache = None if isinstance(self.critic, TrunkCritic) or not self.use_cache else self.rollout_cache
        return cache if cache is not None and cache.has_rows_of(*row) else None

    def _row_values(self, row: tuple[Tensor, ...], cache: RowCache | None) -> Tensor:
        if isinstance(self.critic, TrunkCritic):
            return self._trunk_values(*row[:2])
        return self.in_reward_units(self.critic(self._read_last(self.backbone, row, cache)[0]))

    def _trunk_values(self, ids: Tensor, lengths: Tensor) -> Tensor:
        lengths = lengths.clamp(min=1)
        rows = torch.arange(len(ids), device=ids.device)
        with self._precision():
            hidden = cast("TrunkCritic", self.critic).read(ids[:, : int(lengths.max())], rows, lengths - 1)
        return self.in_reward_units(self.critic(hidden))

    def _critic_outputs(self, hidden: Tensor | None, chunk: Chunk) -> Tensor:
        """Return the critic's outputs at a chunk's transitions, (n,), given the backbone's hidden states (n, H)."""
        if isinstance(self.critic, TrunkCritic):
            with self._precision():
                if chunk.shared is None:
                    hidden = self.critic.read(chunk.ids, chunk.rows, chunk.cols)
                else:
                    hidden = self.critic.read_shared(chunk.shared)
        return self.critic(hidden)

    def in_reward_units(self, outputs: Tensor) -> Tensor:
        """Return the critic's outputs in units of reward: without `value_norm`, unchanged."""
        return outputs if self.value_norm is None else self.value_norm.denormalize(outputs)

    def _unpack(self, observations: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (B, L - 1), lengths (B,) and, for an encoder-decoder, the lengths of the prompts (B,)."""
        row = unpack_observations(observations)
        return (*row, prompt_lengths(observations)) if self.backbone.is_encoder_decoder else row

    def _read_last(
        self, backbone: LanguageModel, row: tuple[Tensor, ...], cache: RowCache | None
    ) -> tuple[Tensor, Tensor]:
        with self._precision():
            # Caches write keys and values in place, which autograd cannot differentiate.
            if cache is not None and self.use_cache and backbone.takes_cache and not torch.is_grad_enabled():
                return cache.read(*row)
            ids, lengths, *n_prompt = row
            lengths = lengths.clamp(min=1)
            rows = torch.arange(len(ids), device=ids.device)
            return backbone(ids[:, : int(lengths.max())], rows, lengths - 1, *n_prompt)

    def _read_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (n, H) at a chunk's transitions, and logits (n, V) if they do not follow from these."""
        if chunk.shared is not None:
            with self._precision():
                return cast("Backbone", self.backbone).read_shared(chunk.shared)
        inputs: tuple[Any, ...] = (chunk.ids, chunk.rows, chunk.cols)
        if self.backbone.is_encoder_decoder:
            if chunk.n_prompt is None:
                raise ValueError("Expected `n_prompt` of the SequenceBatch, got None: an encoder-decoder needs it.")
            inputs = (*inputs, chunk.n_prompt)
        with self._precision():
            return self.backbone.read(*inputs)

    @property
    def shared_columns(self) -> int | None:
        """The most columns with which prompts are shared now (see `SequenceBatch.chunks`); None: none are."""
        # Sharded weights are gathered once for one forward; another library's `LanguageModel` takes no keys and values.
        if self.shards is not None or not self.may_share_prompts or not isinstance(self.backbone, Backbone):
            return None
        readers = [reader for reader in (self.backbone, self.critic) if isinstance(reader, (Backbone, TrunkCritic))]
        if not all(reader.shares_prompts for reader in readers):
            return None
        return min(sys.maxsize if reader.most_columns is None else reader.most_columns for reader in readers)

    def chunks(self, batch: SequenceBatch) -> Iterator[Chunk]:
        """Yield a batch in the chunks that this model reads."""
        return batch.chunks(self.most_tokens, self.shared_columns)

    def evaluate(self, batch: SequenceBatch, actions: Tensor) -> tuple[Tensor, ...]:
        """Score actions under the current weights; one forward reads a sequence with all its transitions.

        Args:
            batch: Sequences with N transitions.
            actions: The tokens taken, (N,).

        Returns:
            Outputs of the critic (values, unless there is a `value_norm`), log-probabilities, entropies and, if `term`
            reads another model, divergences, (N,) float32 each. They can be differentiated once: `evaluate_in_memory`.
        """
        if torch.is_grad_enabled():
            return evaluate_in_memory(self, batch, actions)
        return self.evaluate_parts(batch, actions)

    def evaluate_parts(
        self, batch: SequenceBatch, actions: Tensor, n_forwards: int | None = None
    ) -> tuple[Tensor, ...]:
        """Score actions as `evaluate` does, but let out-of-memory errors through.

        Args:
            batch: Sequences with N transitions.
            actions: The tokens taken, (N,).
            n_forwards: The number of forwards to run, at least that of the batch's chunks: with sharded weights all
                processes must run equally many. With `micro_batch_tokens` the backward pass then repeats each forward.
        """
        evaluate, parts, order = self.evaluate_chunk, [], []
        if n_forwards is not None and batch.micro_batch_tokens is not None:
            evaluate = partial(checkpoint, self.evaluate_chunk, use_reentrant=False)
        for chunk in self.chunks(batch):
            parts.append(evaluate(chunk, actions[torch.as_tensor(chunk.transitions, device=actions.device)]))
            order.append(torch.as_tensor(chunk.transitions))
        inverse = torch.cat(order).argsort().to(actions.device)  # (N,)
        values, *others = (torch.cat(results)[inverse] for results in zip(*parts, strict=True))  # (N,) each
        for _ in range(len(parts), n_forwards or 0):
            first, indices = batch.of_sequences(np.zeros(1, dtype=np.int64))
            results = evaluate(next(first.chunks()), actions[torch.as_tensor(indices, device=actions.device)])
            # Adds 0: keeps this process in the other processes' collective backward.
            values = values + 0.0 * torch.cat(results).sum()
        return values, *others

    def evaluate_chunk(self, chunk: Chunk, actions: Tensor) -> tuple[Tensor, ...]:
        """Score the actions of a chunk, (n,), in one forward; return the results of `evaluate`, (n,) each."""
        hidden, logits = self._read_chunk(chunk)
        outputs = self._critic_outputs(hidden, chunk)
        return outputs, *self._score(hidden, logits, actions, chunk)

    def _score(self, hidden: Tensor, logits: Tensor | None, actions: Tensor, chunk: Chunk) -> tuple[Tensor, ...]:
        """Return what `score_tokens` does, (n,) each; the logits of many transitions are never held at once."""
        parts, read = self._parts(len(hidden)), None if chunk.term is None else chunk.term.read(chunk)
        if logits is not None or len(parts) == 1:
            return self._score_part(hidden, logits, actions, chunk, slice(None), read)
        scores = [
            # The backward computes the logits again: a second forward of the head saves several (n, V) tensors.
            checkpoint(self._score_part, hidden, None, actions, chunk, part, read, use_reentrant=False)
            for part in parts
        ]
        return tuple(torch.cat(results) for results in zip(*scores, strict=True))  # (n,) each

    def _parts(self, n: int) -> list[slice]:
        """Split n transitions into slices whose logits have no more than `MAX_LOGITS` numbers each."""
        size = max(1, MAX_LOGITS // self.backbone.vocab_size)
        return [slice(start, start + size) for start in range(0, n, size)]

    def _score_part(
        self, hidden: Tensor, logits: Tensor | None, actions: Tensor, chunk: Chunk, part: slice, read: PartReader | None
    ) -> tuple[Tensor, ...]:
        adjusted, allowed = self._adjusted(hidden, logits, chunk, part)
        return score_tokens(adjusted, actions[part], allowed, None if read is None else read(part))

    def _adjusted(
        self, hidden: Tensor, logits: Tensor | None, chunk: Chunk, part: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Return adjusted logits (m, V) of some of a chunk's transitions, and the tokens that they could sample."""
        if self.sampling.has_support and chunk.allowed is None:
            raise ValueError(
                "Expected to know which tokens were sampled from (top_k, top_p, min_p), got transitions without: train "
                "with rollout_buffer_class=SequenceRolloutBuffer, which keeps it."
            )
        with self._precision():
            own_logits = self.backbone.logits(hidden[part]) if logits is None else logits[part]
        rows, cols = chunk.rows[part], chunk.cols[part]
        adjusted = self.sampling.adjust(own_logits, lambda: chunk.ids[rows], cols + 1)
        return adjusted, None if chunk.allowed is None else chunk.allowed[part].dense(adjusted.device)

    def log_probs(self, batch: SequenceBatch, actions: Tensor) -> Tensor:
        """Return the log-probabilities of actions (N,), in nats, without values: the scores of a reference model."""
        result = actions.new_zeros(len(actions), dtype=torch.float32)
        for chunk in self.chunks(batch):
            indices = torch.as_tensor(chunk.transitions, device=actions.device)  # (n,)
            # Without the entropies of `_score`, which nobody asks of a reference.
            for scores, part in zip(self.log_probabilities(chunk), self._parts(len(indices)), strict=True):  # (m, V)
                own = indices[part]  # (m,)
                result[own] = scores.gather(-1, actions[own, None]).squeeze(-1)
        return result

    def log_probabilities(self, chunk: Chunk) -> Iterator[Tensor]:
        """Return the log-probabilities of all tokens at a chunk's transitions, (m, V) for m transitions at a time."""
        return map(self.part_reader(chunk), self._parts(len(chunk.transitions)))

    def part_reader(self, chunk: Chunk) -> PartReader:
        """Return the reader of these log-probabilities: the trunk runs now, and the head in each call."""
        hidden, logits = self._read_chunk(chunk)
        return lambda part: TokenDistribution(*self._adjusted(hidden, logits, chunk, part)).log_probabilities

    def distribution(self, batch: SequenceBatch) -> TokenDistribution:
        """Return the distribution over the next token at all N transitions of a batch, (N, V)."""
        logits, order = [], []
        for chunk in self.chunks(batch):
            logits.append(torch.cat(list(self.log_probabilities(chunk))))
            order.append(torch.as_tensor(chunk.transitions))
        inverse = torch.cat(order).argsort().to(logits[0].device)  # (N,)
        return TokenDistribution(torch.cat(logits)[inverse])  # (N, V)

    def sequence_values(self, batch: SequenceBatch) -> Tensor:
        """Return the critic's outputs at all transitions of a batch, (N,), without scoring actions."""
        values = torch.zeros(len(batch), device=batch.tokens.device)
        for chunk in self.chunks(batch):
            hidden = None if isinstance(self.critic, TrunkCritic) else self._read_chunk(chunk)[0]
            indices = torch.as_tensor(chunk.transitions, device=values.device)
            values[indices] = self._critic_outputs(hidden, chunk)
        return values

    @property
    def autocast_dtype(self) -> torch.dtype:
        """The type of forwards with `autocast`."""
        return AUTOCAST_DTYPES.get(self.autocast or "", torch.bfloat16)

    def _precision(self) -> torch.autocast:
        # Autocast's cache would give all parts that a caller's own autocast surrounds one copy of a weight in 16 bits
        # (torch `autocast_mode.cpp`, cached_cast), in which their gradients are summed before they are float32.
        enabled, device = self.autocast is not None, self.backbone.device.type
        return torch.autocast(device, self.autocast_dtype, enabled, cache_enabled=False)
