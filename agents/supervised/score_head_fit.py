"""The fit of a reward model's score head alone, on the last states of a body that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .ranking_data import Example
from .reward_losses import loss_at_last

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # factors of the squared weights, for states of deviation 1
FOLDS = 5  # of the cross-validation that chooses the penalty
MAX_STEPS = 200  # of L-BFGS


def fit_score_head(
    states: Tensor, examples: Sequence[Example], centring: float = 0.0, seed: int = 0
) -> tuple[Tensor, float, float]:
    """Return the weights of a linear score head that minimise loss and squared weights on fixed states.

    A linear probe has far fewer weights to learn than the body, and does not distort the body's features where data are
    few (Kumar et al., 2022). The penalty is the one of `PENALTIES` with the least loss in cross-validation over the
    examples; it applies to states divided by their standard deviations.

    Args:
        states: The last hidden state of each text of the examples, in their order, (N, H).
        examples: The rankings or labelled texts.
        centring: The factor of the squared sum of a pair's scores (`bradley_terry`).
        seed: The seed of the folds.

    Returns:
        The weights (H,), float32; the loss with them, without the penalty; and the penalty.

    Example:
        >>> import torch
        >>> from agents.supervised.ranking_data import Example
        >>> from agents.supervised.score_head_fit import fit_score_head
        >>> states = torch.tensor([[1.0, 0.3], [0.0, 0.2]]).repeat(8, 1)  # the first part tells better from worse
        >>> pairs = [Example([[1], [2]], [(0, 1)]) for _ in range(8)]
        >>> weights, loss, penalty = fit_score_head(states, pairs)
        >>> bool(weights[0] > 0), loss < 0.69
        (True, True)
    """
    deviations = states.double().std(dim=0).clamp_min(1e-6)  # (H,)
    scaled = states.double() / deviations  # (N, H)
    sizes = [len(example.ids) for example in examples]
    owner = np.repeat(np.arange(len(examples)), sizes)  # (N,), the example of each text
    folds = np.random.default_rng(seed).permutation(len(examples)) % FOLDS  # (number of examples,)
    used = [fold for fold in range(FOLDS) if 0 < (folds == fold).sum() < len(examples)]

    def part(is_in: np.ndarray) -> tuple[Tensor, list[Example]]:
        rows = torch.from_numpy(np.flatnonzero(is_in[owner])).to(states.device)
        return scaled[rows], [example for example, own in zip(examples, is_in, strict=True) if own]

    def loss_held_out(penalty: float) -> float:
        total = 0.0
        for fold in used:
            weights = _minimise(*part(folds != fold), penalty, centring)
            held_out, own = part(folds == fold)
            total += float(loss_at_last(held_out @ weights, own, centring)) * len(own)
        return total

    penalty = min(PENALTIES, key=loss_held_out) if used else PENALTIES[0]
    weights = _minimise(scaled, examples, penalty, centring)
    return (weights / deviations).float(), float(loss_at_last(scaled @ weights, examples, centring)), penalty


def _minimise(states: Tensor, examples: Sequence[Example], penalty: float, centring: float) -> Tensor:
    """Return the weights (H,) with the least loss and penalty."""
    weights = torch.zeros(states.shape[1], dtype=states.dtype, device=states.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = loss_at_last(states @ weights, examples, centring) + penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
