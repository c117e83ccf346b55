"""A few logits that a checkpoint keeps: computed again on load, they show a model that is not what it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from .interface import LanguageModel

N_TOKENS, N_PROMPT = 4, 2
N_LOGITS = 256  # of the vocabulary's first tokens, at each place
TOLERANCE = 1e-3  # of the largest logit; devices and kernels differ by less


@torch.no_grad()
def probe_logits(backbone: LanguageModel) -> Tensor:
    """Return some of the logits that a model gives to a few fixed tokens, (3, up to 256) float32 on the CPU."""
    device = backbone.device
    ids = torch.arange(N_TOKENS, device=device)[None] % backbone.vocab_size  # (1, T)
    cols = torch.arange(N_PROMPT - 1, N_TOKENS, device=device)
    n_prompt = [torch.tensor([N_PROMPT], device=device)] if backbone.is_encoder_decoder else []
    _, logits = backbone(ids, torch.zeros_like(cols), cols, *n_prompt)
    return logits[:, :N_LOGITS].float().cpu()


def check_probe(backbone: LanguageModel, kept: Tensor, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn where a model with the weights of a checkpoint gives other logits than it gave then.

    Args:
        backbone: The model, its weights loaded.
        kept: What `probe_logits` returned when the checkpoint was written.
        then: The versions of the libraries then.
        now: The versions of today.
    """
    largest = max(1.0, float(kept.abs().max()))
    off = float((probe_logits(backbone) - kept).abs().max())
    if off <= TOLERANCE * largest:
        return
    changed = [f"{name} {then[name]} -> {version}" for name, version in now.items() if then.get(name) != version]
    warnings.warn(
        f"The same weights give other logits than when the checkpoint was written: {off:.3g} apart, where the largest "
        f"is {largest:.3g}. Versions: {', '.join(changed) or 'the same, so another device, dtype or model code'}. What "
        "was measured before may not hold: evaluate, or install the versions of then.",
        stacklevel=3,
    )
