"""The one distribution over the next token: tokens are sampled from it and scored under it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical


class TokenDistribution:
    """softmax(logits / temperature) over the vocabulary, in float32 whatever the logits are.

    It has the members of Stable-Baselines3's `Distribution` that actor-critic algorithms use.

    Args:
        logits: (N, V).
        temperature: Divides the logits; the same in rollout, update and reference (invariant A2).

    Attributes:
        log_probabilities: (N, V) float32.

    Example:
        >>> import torch
        >>> from agents.sampling import TokenDistribution
        >>> distribution = TokenDistribution(torch.tensor([[0.0, 0.0]]))
        >>> round(float(distribution.log_prob(torch.tensor([1]))), 3)
        -0.693
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        self.log_probabilities = _log_softmax(logits, temperature)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a token for each row, (N,), by inverting the cumulative distribution.

        Exact, and about ten times faster on a CPU than `torch.multinomial`. A token of probability 0 is never drawn.

        Args:
            generator: Where the uniform numbers come from; it lives on the CPU, so that all devices draw the same.
        """
        cumulative = self.log_probabilities.exp().cumsum(dim=-1)  # (N, V)
        total = cumulative[:, -1:]
        uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device)  # (N, 1)
        draw = (uniform * total).minimum(total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(cumulative, draw, right=True).squeeze(-1)  # (N,)

    def mode(self) -> Tensor:
        """Return the most probable token of each row, (N,)."""
        return self.log_probabilities.argmax(dim=-1)

    def get_actions(self, deterministic: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Return `mode()` or `sample()`, (N,)."""
        return self.mode() if deterministic else self.sample(generator)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-probability of a token in each row, (N,), in nats."""
        return self.log_probabilities.gather(-1, actions.long().reshape(-1, 1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return the entropy of each row, (N,), in nats."""
        return -(self.log_probabilities.exp() * self.log_probabilities).sum(dim=-1)

    @property
    def distribution(self) -> Categorical:
        """The same as a torch distribution, as SB3's `CategoricalDistribution.distribution`."""
        return Categorical(logits=self.log_probabilities)


def score_tokens(logits: Tensor, actions: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of `TokenDistribution(logits, temperature)`, with a lean backward.

    The same numbers and gradients in about half the passes over the vocabulary: one tensor of (N, V) is kept for the
    backward, and the gradient of both is written in one expression. It has no second derivative, and says so when
    asked for one; `TokenDistribution` has.

    Args:
        logits: (N, V).
        actions: The tokens taken, (N,).
        temperature: Divides the logits.

    Returns:
        Log-probabilities and entropies, (N,) float32, in nats.
    """
    log_probs, entropies = _ScoreTokens.apply(logits, actions, temperature)
    return log_probs, entropies


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, actions: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        log_probabilities = _log_softmax(logits, temperature)  # (N, V)
        weighted = log_probabilities.exp().mul_(log_probabilities)
        entropies = -weighted.sum(dim=-1)
        ctx.save_for_backward(log_probabilities, actions, entropies)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return log_probabilities.gather(-1, actions[:, None]).squeeze(-1), entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # what is saved is no input: a second derivative would be wrong in silence
            raise RuntimeError(
                "Expected to differentiate `score_tokens` once, got create_graph=True: for second derivatives take "
                "log-probabilities from get_distribution (TRPO with FlatLMPolicy does)."
            )
        by_log_prob, by_entropy = (gradient / ctx.temperature for gradient in gradients)  # (N,), (N,)
        log_probabilities, actions, entropies = ctx.saved_tensors
        # d log p(a) / d logits = onehot(a) - p;  d H / d logits = -p (log p + H)
        constant = by_log_prob + by_entropy * entropies
        result = torch.addcmul(-constant[:, None], log_probabilities, by_entropy[:, None], value=-1)
        result *= log_probabilities.exp()
        result.scatter_add_(-1, actions[:, None], by_log_prob[:, None])
        return result.to(ctx.dtype), None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
