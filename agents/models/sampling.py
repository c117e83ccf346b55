"""The distribution over the next token, from which rollouts sample and under which updates score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

# A logit of probability 0, and the smallest log-probability: some models have logits of -inf, or of numbers that become
# it when the temperature divides them. In entropies and gradients, 0 * -1e30 is 0, where 0 * -inf would be NaN.
FORBIDDEN = -1e30
BLOCK = 1 << 20  # numbers of float32 of which probabilities are held at once beside log-probabilities: 4 MiB


@dataclass(frozen=True)
class Sampling:
    """The settings by which logits become the distribution of sampling and of scoring.

    In this order: repetition penalty, temperature, the env's mask, top-k, top-p, min-p. The last three choose the
    tokens that can be sampled (`has_support`). Their choice is made when a token is sampled, stored with it and used
    again when it is scored, so that the probability ratio of an unchanged policy is 1. That needs a
    `SequenceRolloutBuffer`.

    Args:
        temperature: Divides the logits.
        top_k: Keep the k most probable tokens, and any as probable as the last of them.
        top_p: Keep the most probable tokens until their probabilities sum to this (Holtzman et al., 2020, section 3.1).
        min_p: Keep tokens of at least this share of the largest probability (Nguyen et al., 2024).
        repetition_penalty: Divides positive and multiplies negative logits of tokens that are already in the row,
            prompt included (Keskar et al., 2019, section 4.1).
        top_p_lag: Take the tokens of `top_p` from a copy of the policy that is renewed every so many updates: the mask
            of NLPO (Ramamurthy et al., 2022, algorithm 1).

    Raises:
        ValueError: For a value outside its range.

    Example:
        >>> import torch
        >>> from agents.models.sampling import Sampling
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> Sampling(top_k=2).support(logits).tolist()
        [[True, True, False]]
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    top_p_lag: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"Expected `temperature` above 0, got {self.temperature}; greedy is deterministic=True.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Expected `top_k` of at least 1, or None, got {self.top_k}.")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"Expected `{name}` above 0 and at most 1, or None, got {share}.")
        if not self.repetition_penalty > 0:
            raise ValueError(f"Expected `repetition_penalty` above 0, got {self.repetition_penalty}.")
        if self.top_p_lag is not None and (self.top_p is None or self.top_p_lag < 1):
            raise ValueError(f"Expected `top_p_lag` of at least 1 beside `top_p`, got {self.top_p_lag}.")

    @property
    def has_support(self) -> bool:
        """Whether top-k, top-p or min-p leave tokens out, so that the choice must be stored with each transition."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None

    def adjust(self, logits: Tensor, tokens: Callable[[], Tensor], counts: Tensor) -> Tensor:
        """Return logits (N, V) float32 after repetition penalty and temperature.

        Args:
            logits: (N, V).
            tokens: Returns the row of each transition, (N, T); called only if there is a repetition penalty.
            counts: The number of tokens before each transition in its row, (N,).
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            ids = tokens()
            before = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]  # (N, T)
            counted = torch.zeros_like(logits).scatter_add_(1, ids, before.to(logits.dtype))  # (N, V)
            seen = counted > 0  # (N, V)
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        return logits if self.temperature == 1 else logits / self.temperature

    def support(self, logits: Tensor, allowed: Tensor | None = None, lagged: Tensor | None = None) -> Tensor | None:
        """Return the tokens that can be sampled, (B, V) bool; None for all tokens.

        Args:
            logits: The logits that `adjust` returned, (B, V).
            allowed: The env's mask, (B, V) bool; None allows all.
            lagged: Such logits of the lagged copy, (B, V), with `top_p_lag`.
        """
        if not self.has_support:
            return allowed
        logits = _masked(logits, allowed)
        support = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            support = support & (logits >= logits.topk(self.top_k, dim=-1).values[:, -1:])  # the k-th largest, (B, 1)
        if self.top_p is not None:
            support = support & _nucleus(_masked(logits if lagged is None else lagged, support), self.top_p)
        if self.min_p is not None:
            probabilities = _masked(logits, support).softmax(dim=-1)  # (B, V)
            support = support & (probabilities >= self.min_p * probabilities.amax(dim=-1, keepdim=True))
        return support


def _masked(logits: Tensor, allowed: Tensor | None) -> Tensor:
    return logits if allowed is None else torch.where(allowed, logits, FORBIDDEN)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return the fewest most probable tokens whose probabilities sum to at least `top_p`, (B, V) bool."""
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # (B, V): the sum over the tokens that are more probable
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)


class TokenDistribution:
    """The softmax over the allowed part of the vocabulary, in float32 whatever the type of the logits.

    It has the members of Stable-Baselines3's `common.distributions.Distribution` that actor-critic algorithms use.

    Args:
        logits: (N, V), as `Sampling.adjust` returns them: in rollout, update and reference alike.
        allowed: The tokens with a probability, (N, V) bool; None allows all. The others have probability 0 exactly.

    Attributes:
        log_probabilities: (N, V) float32, in nats; about -1e30 where not allowed, and at least that where the model's
            own logit is -inf.

    Example:
        >>> import torch
        >>> from agents.models.sampling import TokenDistribution
        >>> distribution = TokenDistribution(torch.tensor([[0.0, 0.0]]))
        >>> round(float(distribution.log_prob(torch.tensor([1]))), 3)
        -0.693
    """

    def __init__(self, logits: Tensor, allowed: Tensor | None = None) -> None:
        self.log_probabilities = _log_softmax(logits, allowed)
        self.is_masked = allowed is not None

    def sample(self, generator: torch.Generator | Tensor | None = None) -> Tensor:
        """Draw a token for each row, (N,), by inverting the cumulative distribution.

        Exact, and about ten times faster on a CPU than `torch.multinomial`. A token of probability 0 is never drawn.

        Args:
            generator: The source of the uniform numbers, on the CPU, so that every device draws the same tokens; or
                the numbers themselves, (N, 1) in [0, 1).
        """
        probabilities = _probabilities(self.log_probabilities, self.is_masked)
        cumulative = probabilities.cumsum(dim=-1)  # (N, V)
        total = cumulative[:, -1:]  # (N, 1)
        if isinstance(generator, Tensor):
            uniform = generator.to(cumulative.device)  # (N, 1)
        else:
            uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device)  # (N, 1)
        # `uniform` is below 1, but its product with the total may round up to the total, which is past the last token.
        draw = (uniform * total).minimum(total.nextafter(torch.zeros_like(total)))  # (N, 1)
        tokens = torch.searchsorted(cumulative, draw, right=True)  # (N, 1)
        # A GPU sums in parallel: unlike on a CPU, the sum may rise by rounding at a token of probability 0.
        if self.is_masked and not cumulative.is_cpu:
            tokens = torch.where(probabilities.gather(-1, tokens) > 0, tokens, self.mode()[:, None])
        return tokens.squeeze(-1)  # (N, 1) to (N,)

    def mode(self) -> Tensor:
        """Return the most probable token of each row, (N,)."""
        return self.log_probabilities.argmax(dim=-1)

    def get_actions(self, deterministic: bool = False, generator: torch.Generator | Tensor | None = None) -> Tensor:
        """Return `mode()` or `sample()`, (N,)."""
        return self.mode() if deterministic else self.sample(generator)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-probability of a token in each row, (N,), in nats."""
        columns = actions.long().reshape(-1, 1)  # (N,) or (N, 1) to (N, 1)
        return self.log_probabilities.gather(-1, columns).squeeze(-1)  # (N, V) to (N, 1) to (N,)

    def entropy(self) -> Tensor:
        """Return the entropy of each row, (N,), in nats."""
        return -(_probabilities(self.log_probabilities, self.is_masked) * self.log_probabilities).sum(dim=-1)

    @property
    def distribution(self) -> Categorical:
        """This distribution as torch's `Categorical`, the attribute of SB3 `CategoricalDistribution`."""
        return Categorical(logits=self.log_probabilities)


def score_tokens(
    logits: Tensor, actions: Tensor, allowed: Tensor | None = None, others: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return log-probabilities and entropies of `TokenDistribution(logits, allowed)`, with a lean backward.

    Numbers and gradients are the same, in about half the passes over the vocabulary: the backward keeps one tensor of
    (N, V), or two with `others`, and computes the gradients of all results together. There is no second derivative:
    asking for one raises RuntimeError; `TokenDistribution` has it.

    Args:
        logits: (N, V).
        actions: The tokens taken, (N,).
        allowed: The tokens with a probability, (N, V) bool; None allows all.
        others: The log-probabilities of all tokens by another distribution over the same tokens, (N, V), in nats.

    Returns:
        Log-probabilities and entropies and, with `others`, the divergences KL(this, other), (N,) float32 each, in nats.

    Example:
        >>> import torch
        >>> from agents.models.sampling import score_tokens
        >>> log_probs, entropies = score_tokens(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(float(log_probs), 3), round(float(entropies), 3)  # -log 4 and log 4
        (-1.386, 1.386)
    """
    return _ScoreTokens.apply(logits, actions, allowed, others)


class _ScoreTokens(torch.autograd.Function):
    """The log-probability of a token, the entropy and a divergence, with the backward of all written out."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, actions: Tensor, allowed: Tensor | None, others: Tensor | None
    ) -> tuple[Tensor, ...]:
        log_probabilities = _log_softmax(logits, allowed)  # (N, V)
        sums = [
            _probabilities(block, allowed is not None).mul_(block).sum(dim=-1)  # (n, V) to (n,)
            for block in _blocks(log_probabilities)
        ]
        results = [-torch.cat(sums)]  # (N,) each: the entropies, and the divergences
        if others is not None:
            # A token of probability 0 adds 0: its log-probability is a large number, not -inf.
            sums = [
                _probabilities(block, allowed is not None).mul_(block - other).sum(dim=-1)  # (n, V) to (n,)
                for block, other in zip(_blocks(log_probabilities), _blocks(others), strict=True)
            ]
            results.append(torch.cat(sums))
        ctx.save_for_backward(log_probabilities, actions, others, *results)
        ctx.dtype, ctx.is_masked = logits.dtype, allowed is not None
        log_probs = log_probabilities.gather(-1, actions[:, None]).squeeze(-1)  # (N, V) to (N, 1) to (N,)
        return log_probs, *results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The saved tensors are not inputs of the function: a second derivative would silently be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Expected to differentiate `score_tokens` once, got create_graph=True: for second derivatives take "
                "log-probabilities from get_distribution (TRPO with FlatLMPolicy does)."
            )
        by_log_prob, by_entropy, *by_divergence = gradients  # (N,) each
        log_probabilities, actions, others, entropies, *divergences = ctx.saved_tensors
        # d log p(a) / d logits = onehot(a) - p;  d H / d logits = -p (log p + H);  d KL / d logits = p (log p/q - KL)
        constant, slope = by_log_prob + by_entropy * entropies, by_entropy  # (N,): the factors of -p and -p log p
        if others is not None:
            constant, slope = constant + by_divergence[0] * divergences[0], slope - by_divergence[0]
        result = torch.addcmul(-constant[:, None], log_probabilities, slope[:, None], value=-1)  # (N, V)
        if others is not None:
            result.addcmul_(others, by_divergence[0][:, None], value=-1)
        for part, block in zip(_blocks(result), _blocks(log_probabilities), strict=True):
            part *= _probabilities(block, ctx.is_masked)
        result.scatter_add_(-1, actions[:, None], by_log_prob[:, None])
        return result.to(ctx.dtype), None, None, None


def _blocks(scores: Tensor) -> tuple[Tensor, ...]:
    """Split scores (N, V) by rows, (n, V) each, with no more than `BLOCK` numbers: probabilities take little memory."""
    return scores.split(max(1, BLOCK // scores.shape[-1]))


def _log_softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Return the log-probabilities of the allowed tokens, (N, V) float32, not below `FORBIDDEN`."""
    log_probabilities = torch.log_softmax(_masked(logits.float(), allowed), dim=-1)
    if log_probabilities.requires_grad:  # autograd needs the result of `log_softmax` as it was
        return log_probabilities.clamp(min=FORBIDDEN)
    return log_probabilities.clamp_(min=FORBIDDEN)  # without a copy: it runs at every step of a rollout


def _probabilities(log_probabilities: Tensor, is_masked: bool) -> Tensor:
    # On a CPU `exp` is several times slower where it underflows, as it does at each forbidden token.
    return log_probabilities.softmax(dim=-1) if is_masked else log_probabilities.exp()
