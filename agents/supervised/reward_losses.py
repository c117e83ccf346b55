"""The losses of reward models: scores of rankings or labelled texts in, a mean loss out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from .ranking_data import Example

Loss: TypeAlias = Literal["last", "tokens"]


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centring: float = 0.0) -> Tensor:
    """Return the loss of each pair of scores, in nats: -log sigmoid(chosen - rejected - margin) + centring * (sum)^2.

    Args:
        chosen: The scores of the better texts, (P,).
        rejected: The scores of the worse texts, (P,).
        margin: The difference to train, in nats (Touvron et al., 2023, equation 2).
        centring: The factor of the squared sum (Eisenstein et al., 2023, equation 2).

    Example:
        >>> import torch
        >>> from agents.supervised.reward_losses import bradley_terry
        >>> loss = bradley_terry(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]), margin=0.0, centring=0.5)
        >>> [round(value, 4) for value in loss.tolist()]
        [0.6931, 2.1269]
    """
    return -functional.logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2


def loss_at_last(scores: Tensor, examples: Sequence[Example], centring: float = 0.0) -> Tensor:
    """Return the mean over rankings of the mean loss of their pairs, or the mean squared error of labels.

    Args:
        scores: The scores of all texts of the examples, in their order, each at its last token, (B,).
        examples: The rankings or labelled texts.
        centring: The factor of the squared sum of a pair's scores.
    """
    if examples[0].label is not None:
        labels = torch.tensor([example.label for example in examples], dtype=scores.dtype, device=scores.device)
        return functional.mse_loss(scores, labels)
    chosen, rejected, margins, weights = (torch.tensor(values, device=scores.device) for values in _pairs(examples))
    return (bradley_terry(scores[chosen], scores[rejected], margins, centring) * weights).sum()


def loss_at_tokens(
    ids: Tensor, scores: Tensor, lasts: Tensor, examples: Sequence[Example], centring: float = 0.0
) -> Tensor:
    """Return the mean over rankings of the mean loss of their pairs, each the mean over its columns.

    Args:
        ids: The tokens of all texts of the rankings, in their order, padded on the right, (B, T).
        scores: The score at each token, (B, T).
        lasts: The column of each text's last token, (B,).
        examples: The rankings.
        centring: The factor of the squared sum of a pair's scores.
    """
    chosen, rejected, margins, weights = (torch.tensor(values, device=ids.device) for values in _pairs(examples))
    return (_per_token(ids, scores, lasts, chosen, rejected, margins, centring) * weights).sum()


def _pairs(examples: Sequence[Example]) -> Iterator[list[int] | list[float]]:
    """Yield the rows of better texts, the rows of worse texts, margins and weights, (P,) each.

    The weights of a ranking's pairs add up to 1 / (number of rankings), however many texts it has.
    """
    chosen, rejected, margins, weights, first = [], [], [], [], 0
    for example in examples:
        for better, worse in example.pairs:
            chosen.append(first + better)
            rejected.append(first + worse)
            margins.append(float(example.margin))
            weights.append(1.0 / (len(example.pairs) * len(examples)))
        first += len(example.ids)
    yield from (chosen, rejected, margins, weights)


def _per_token(
    ids: Tensor, scores: Tensor, lasts: Tensor, chosen: Tensor, rejected: Tensor, margins: Tensor, centring: float
) -> Tensor:
    """Return the mean loss of each pair, (P,), from the first column where its texts differ to the end of both."""
    columns = torch.arange(ids.shape[1], device=ids.device)  # (T,)
    # After a text's end, its last score is repeated.
    better, worse = (
        scores[rows].gather(1, torch.minimum(columns, lasts[rows, None]))  # (P, T)
        for rows in (chosen, rejected)
    )
    end = torch.maximum(lasts[chosen], lasts[rejected])[:, None]  # (P, 1)
    has_both = columns <= torch.minimum(lasts[chosen], lasts[rejected])[:, None]  # (P, T)
    differs = (ids[chosen] != ids[rejected]) | ~has_both
    # The last column always counts: equal texts differ in no other.
    is_counted = (differs.cumsum(dim=1) > 0) & (columns <= end) | (columns == end)
    losses = bradley_terry(better, worse, margins[:, None], centring)  # (P, T)
    return torch.where(is_counted, losses, 0.0).sum(dim=1) / is_counted.sum(dim=1)
