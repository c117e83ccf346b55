"""The lagged copy of the policy, which chooses the tokens that may be sampled: the mask of NLPO."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.interface import LanguageModel


class LaggedCopy(nn.Module):
    """A frozen copy of the language model that is renewed every few updates (Ramamurthy et al., 2022, algorithm 1).

    Args:
        backbone: The language model to copy.
        every: The number of updates from one renewal to the next; the copy takes the weights that sampled the last
            rollout.
    """

    n_updates: Tensor

    def __init__(self, backbone: LanguageModel, every: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        for weight in self.backbone.parameters():
            weight.requires_grad_(False)
        self.every = every
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.long))  # so that files and checkpoints keep it
        self.rollout_cache, self.predict_cache = self.backbone.new_cache(), self.backbone.new_cache()

    @torch.no_grad()
    def count_update(self, backbone: LanguageModel) -> None:
        """Count an update that begins; before every `every`-th update, copy the weights of `backbone`."""
        self.n_updates += 1
        if int(self.n_updates) % self.every == 0:
            for copied, weight in zip(self.backbone.parameters(), backbone.parameters(), strict=True):
                copied.copy_(weight)
            self.drop_caches()

    def drop_caches(self) -> None:
        """Forget the keys and values of all rows."""
        for cache in (self.rollout_cache, self.predict_cache):
            if cache is not None:
                cache.drop()
