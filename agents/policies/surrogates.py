"""Surrogates: weights of the policy gradient in place of PPO's clipped ratio, under its unmodified loss."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from ..models.sequences import SequenceBatch

NO_CLIP = 1e9  # a `clip_range` at which SB3's own clip never acts; infinity is no number of JSON


class Terms(NamedTuple):
    """The numbers of a minibatch, of N tokens in S whole sequences, from which a surrogate computes its weights.

    None of them has a graph. With several processes they are those of this process, whose sequences are whole.
    """

    log_probs: Tensor  # (N,) in nats, by the current weights
    old_log_probs: Tensor  # (N,) in nats, by the weights of the rollout
    advantages: Tensor  # (N,) as the loss has them: normalised, weighted by an engine's ratios, and aggregated
    rows: Tensor  # (N,): the sequence of each token
    counts: Tensor  # (S,): the number of tokens of each sequence that are trained

    @property
    def ratios(self) -> Tensor:
        """The ratio of new to old probability of each token, (N,)."""
        return (self.log_probs - self.old_log_probs).exp()

    def sequence_means(self, numbers: Tensor) -> Tensor:
        """Return for each token the mean of its sequence, (N,), given a number for each token, (N,)."""
        sums = numbers.new_zeros(len(self.counts)).index_add(0, self.rows, numbers)  # (S,)
        return (sums / self.counts.clamp(min=1))[self.rows]


SurrogateFunction: TypeAlias = Callable[[Terms], Tensor]


class Surrogate(ABC):
    """The base class of the surrogates that have names.

    A surrogate maps the terms of a minibatch to a weight w for each token, and the gradient of the loss is that of
    -mean(A w log pi), with A the advantages. PPO's own weights are the ratios, and 0 where they are clipped. A function
    `(terms) -> weights` serves as well, as in the example of `ClipHigher`.
    """

    @abstractmethod
    def __call__(self, terms: Terms) -> Tensor:
        """Return the weight of each token, (N,)."""

    def is_clipped(self, terms: Terms, weights: Tensor) -> Tensor:
        """Return which tokens are clipped, (N,) bool, for `train/surrogate_clip_fraction`."""
        return weights == 0


@dataclass(frozen=True)
class ClipHigher(Surrogate):
    """PPO's clip with two bounds: the larger upper one lets unlikely tokens grow (DAPO, arXiv 2503.14476, section 3.1).

    The objective of a token is min(r A, clip(r, 1 - low, 1 + high) A); with low = high it is PPO's own.

    Args:
        low: The distance of the lower bound from 1, for tokens with negative advantages.
        high: The distance of the upper bound from 1, for tokens with positive advantages.

    Raises:
        ValueError: If a bound is negative.

    Example:
        >>> import torch
        >>> from agents import ClipHigher, make_agent
        >>> def fading(terms):
        ...     '''Let a token's gradient fade out as its ratio moves from 1 to 0.5 or 1.5: a surrogate of one's own.'''
        ...     distances = (terms.ratios - 1).abs()
        ...     return terms.ratios * (1 - distances / 0.5).clamp(min=0)
        >>> for surrogate in (ClipHigher(low=0.2, high=0.28), fading):
        ...     options = dict(surrogate=surrogate)  # make_agent(env, "gpt2", policy_kwargs=options)
    """

    low: float = 0.2
    high: float = 0.28

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def __call__(self, terms: Terms) -> Tensor:
        return _clipped(terms.ratios, terms.advantages, self.low, self.high)


@dataclass(frozen=True)
class DualClip(Surrogate):
    """PPO's clip, and a bound for tokens with negative advantages whose ratio has grown (arXiv 1912.09729).

    PPO's loss has no bound there: the objective of a token is max(min(r A, clip(r, 1 - low, 1 + high) A), most A) for
    A < 0, and that of PPO for others.

    Args:
        low: The distance of the lower bound from 1.
        high: The distance of the upper bound from 1.
        most: The ratio above which a token with a negative advantage has no gradient; more than 1.

    Raises:
        ValueError: If a bound is out of range.

    Example:
        >>> from agents import DualClip
        >>> options = dict(surrogate=DualClip(most=3.0))  # make_agent(env, "gpt2", policy_kwargs=options)
    """

    low: float = 0.2
    high: float = 0.2
    most: float = 3.0

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)
        if not self.most > 1:
            raise ValueError(f"Expected `most` above 1, got {self.most}: ratios begin at 1.")

    def __call__(self, terms: Terms) -> Tensor:
        weights = _clipped(terms.ratios, terms.advantages, self.low, self.high)
        return weights.masked_fill((terms.advantages < 0) & (terms.ratios > self.most), 0.0)


@dataclass(frozen=True)
class CISPO(Surrogate):
    """Bounded ratios as constant weights, so that no token loses its gradient (MiniMax-M1, arXiv 2506.13585, eq. 4).

    The objective of a token is sg(clip(r, 1 - low, 1 + high)) A log pi, where sg stops the gradient.

    Args:
        low: The distance of the lower bound from 1; None, as in the paper's runs, for no lower bound.
        high: The distance of the upper bound from 1. The paper tunes it and states no number.

    Raises:
        ValueError: If a bound is negative.

    Example:
        >>> from agents import CISPO
        >>> options = dict(surrogate=CISPO(high=1.0))  # make_agent(env, "gpt2", policy_kwargs=options)
    """

    low: float | None = None
    high: float = 4.0

    def __post_init__(self) -> None:
        _check_bounds(self.low or 0.0, self.high)

    def __call__(self, terms: Terms) -> Tensor:
        return terms.ratios.clamp(0.0 if self.low is None else 1 - self.low, 1 + self.high)

    def is_clipped(self, terms: Terms, weights: Tensor) -> Tensor:
        """Return which ratios are bounded, (N,) bool: all weights are positive."""
        return weights != terms.ratios


@dataclass(frozen=True)
class GSPO(Surrogate):
    """One ratio for all tokens of a sequence, clipped (arXiv 2507.18071): the geometric mean of the tokens' ratios.

    It has the paper's form for advantages that differ from token to token (GSPO-token): the objective of a token is
    min(s A, clip(s, 1 - low, 1 + high) A) with s = sg(s_i) pi / sg(pi). Where the tokens of a sequence have one
    advantage, its gradient is that of the paper's sequence objective. The paper averages over sequences: pass
    `rollout_buffer_kwargs=dict(aggregation="sequence")`. A sequence is what a rollout has of an episode, without the
    tokens that the environment wrote; with `complete_episodes` it is the whole episode.

    Args:
        low: The distance of the lower bound from 1; a mean over tokens stays nearer to 1 than single ratios do.
        high: The distance of the upper bound from 1.

    Raises:
        ValueError: If a bound is negative.

    Example:
        >>> from agents import GSPO
        >>> options = dict(surrogate=GSPO())  # make_agent(env, "gpt2", policy_kwargs=options, ...)
    """

    low: float = 3e-4
    high: float = 4e-4

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def __call__(self, terms: Terms) -> Tensor:
        ratios = terms.sequence_means(terms.log_probs - terms.old_log_probs).exp()
        return _clipped(ratios, terms.advantages, self.low, self.high)


@dataclass(frozen=True)
class SoftGate(Surrogate):
    """A gate that fades smoothly as the ratio leaves 1, in place of a clip (SAPO, arXiv 2511.20347).

    The objective of a token is A sigmoid(t (r - 1)) 4 / t, whose weight is 4 p (1 - p) r with p = sigmoid(t (r - 1)).

    Args:
        positive: The temperature t of tokens with positive advantages: the larger, the narrower the gate.
        negative: The temperature t of the others.

    Raises:
        ValueError: If a temperature is not positive.

    Example:
        >>> from agents import SoftGate
        >>> options = dict(surrogate=SoftGate())  # make_agent(env, "gpt2", policy_kwargs=options)
    """

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        if not min(self.positive, self.negative) > 0:
            raise ValueError(f"Expected temperatures above 0, got {self}.")

    def __call__(self, terms: Terms) -> Tensor:
        ratios = terms.ratios
        gates = torch.where(
            terms.advantages > 0,
            ((ratios - 1) * self.positive).sigmoid(),
            ((ratios - 1) * self.negative).sigmoid(),
        )
        return 4 * gates * (1 - gates) * ratios


# The names of configurations. The paths are made here, since the room of configurations is below this one.
SURROGATES = {
    name: f"{__name__}:{surrogate.__name__}"
    for name, surrogate in (
        ("clip_higher", ClipHigher),
        ("dual_clip", DualClip),
        ("cispo", CISPO),
        ("gspo", GSPO),
        ("soft_gate", SoftGate),
    )
}


def _check_bounds(low: float, high: float) -> None:
    if not min(low, high) >= 0:
        raise ValueError(f"Expected `low` and `high` of 0 or more, got {low} and {high}: they are distances from 1.")


def _clipped(ratios: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return the weights of min(r A, clip(r, 1 - low, 1 + high) A): the ratios, and 0 where the clip acts."""
    is_cut = ((advantages > 0) & (ratios > 1 + high)) | ((advantages < 0) & (ratios < 1 - low))
    return ratios.masked_fill(is_cut, 0.0)


class SurrogateLoss:
    """The log-probabilities by which PPO's loss gets the gradient of a surrogate, and the figures of an update.

    SB3 `ppo.PPO.train` computes `ratio = exp(log_prob - old_log_prob)` and the loss -mean(A ratio), if its clip never
    acts. Its gradient is -mean(A ratio grad(log_prob)). Here each log-probability keeps its value, and its gradient is
    multiplied by w / ratio: the loss has the surrogate's gradient, and `train/approx_kl`, by which `target_kl` stops
    an update, stays the divergence of the policy, whatever the surrogate.

    Args:
        function: The surrogate; None leaves everything to PPO.
    """

    def __init__(self, function: SurrogateFunction | None) -> None:
        self.function = function
        self._figures: list[Tensor] = []  # of each minibatch since the last record: mean weight and clipped share

    def log_probs(self, batch: SequenceBatch, log_probs: Tensor) -> Tensor:
        """Return log-probabilities, (N,), with the gradient that the surrogate's loss needs.

        Batches that are no minibatch of an update (see `SequenceRolloutBuffer.get`) have no old log-probabilities, and
        keep the gradient of the log-probabilities.

        Raises:
            ValueError: If a function does not return one weight for each token.
        """
        if self.function is None or batch.old_log_probs is None:
            return log_probs
        assert batch.advantages is not None, "set together with old_log_probs"
        rows = torch.as_tensor(batch.rows, device=log_probs.device)
        counts = np.bincount(batch.rows, minlength=len(batch.lengths))
        with torch.no_grad():
            values = log_probs.detach()
            counted = torch.as_tensor(counts, device=log_probs.device)
            terms = Terms(values, batch.old_log_probs, batch.advantages, rows, counted)
            weights = self.function(terms)
            if not isinstance(weights, Tensor) or weights.shape != values.shape:
                got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
                raise ValueError(f"Expected a weight for each of {len(values)} tokens from {self.function}, got {got}.")
            # A token whose ratio is 0 in float32 has no gradient in SB3's loss; 0 / 0 would make it NaN.
            factors = weights / terms.ratios.clamp(min=1e-30)
            named = self.function if isinstance(self.function, Surrogate) else None
            clipped = weights == 0 if named is None else named.is_clipped(terms, weights)
            self._figures.append(torch.stack([weights.mean(), clipped.to(weights.dtype).mean()]))
        return values + factors * (log_probs - values)  # the value itself: the difference is 0

    def record(self, algorithm: BaseAlgorithm) -> None:
        """Record the last update's figures, and how the loss is aggregated, in the algorithm's log.

        A rollout that begins calls it: SB3 `on_policy_algorithm.learn` dumps the figures of an update after it.
        """
        figures, self._figures = self._figures, []
        logger = vars(algorithm).get("_logger")  # none before the first `learn`
        if logger is None:
            return
        logger.record("train/aggregation", _aggregation(algorithm))
        if figures:
            weight, clipped = torch.stack(figures).mean(dim=0).tolist()
            logger.record("train/surrogate_weight", weight)
            logger.record("train/surrogate_clip_fraction", clipped)


def _aggregation(algorithm: BaseAlgorithm) -> str:
    """Return how the algorithm's buffer aggregates the losses of tokens; other buffers leave them as they are."""
    return str((vars(algorithm).get("rollout_buffer_kwargs") or {}).get("aggregation", "token"))


def check_loss(algorithm: BaseAlgorithm, function: SurrogateFunction | None) -> None:
    """Check, before its policy is built, that the loss of an algorithm has the gradient of a surrogate.

    Raises:
        ValueError: If its own clip would act, too, if it has no ratios to clip, or if it normalises advantages after
            they have been aggregated.
    """
    settings, name, aggregation = vars(algorithm), type(algorithm).__name__, _aggregation(algorithm)
    if function is None and aggregation == "token":
        return
    if settings.get("normalize_advantage"):
        raise ValueError(
            f"Expected normalize_advantage=False of {name} with surrogate={function} and aggregation={aggregation!r}, "
            "got True, which subtracts a mean after both have read the advantages: pass "
            "rollout_buffer_kwargs=dict(normalize_advantage=True), which normalises before."
        )
    if function is None:
        return
    for known, reason in NO_RATIOS.items():
        if isinstance(algorithm, known):
            raise ValueError(f"Expected PPO or MaskablePPO with surrogate={function}, got {name}: {reason}")
    buffer = settings.get("rollout_buffer_class")
    if buffer is None or "aggregation" not in inspect.signature(buffer).parameters:
        raise ValueError(
            f"Expected rollout_buffer_class=SequenceRolloutBuffer with surrogate={function}, got {buffer}: a "
            "surrogate needs the whole sequences and their advantages."
        )
    # A number or a schedule: SB3 `ppo.PPO._setup_model` makes the schedule after the policy.
    clip_range = FloatSchedule(settings["clip_range"])
    smallest = min(clip_range(progress) for progress in (1.0, 0.5, 0.0))
    if not smallest >= NO_CLIP:
        raise ValueError(
            f"Expected clip_range={NO_CLIP:g} of {name} with surrogate={function}, got {smallest}, which would clip "
            "again: the surrogate has its own bounds. make_agent sets it."
        )


NO_RATIOS: dict[type[BaseAlgorithm], str] = {
    A2C: "it takes one step from the policy that sampled, where all ratios are 1 and all surrogates the same.",
    TRPO: "it bounds its steps by the divergence itself, and its line search compares plain ratios.",
}
