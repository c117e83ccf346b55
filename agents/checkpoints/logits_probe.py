"""The logits probe of a checkpoint: logits computed again on load, which show whether the model still computes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.interface import LanguageModel

N_TOKENS, N_PROMPT = 4, 2  # a prompt and a completion of two tokens each: one forward of a few tokens
N_LOGITS = 256  # of the vocabulary's first tokens, at each position: enough to differ, and a few kB on the disk
TOLERANCE = 1e-3  # of the largest logit: devices and kernels differ by less in float32


@torch.no_grad()
def probe_logits(backbone: LanguageModel) -> Tensor:
    """Return some logits of a model for a few fixed tokens, (3, up to 256) float32 on the CPU."""
    device = backbone.device
    ids = torch.arange(N_TOKENS, device=device)[None] % backbone.vocab_size  # (1, T)
    # (3,): the last column of the prompt, and both columns of the completion
    cols = torch.arange(N_PROMPT - 1, N_TOKENS, device=device)
    n_prompt = [torch.tensor([N_PROMPT], device=device)] if backbone.is_encoder_decoder else []
    _, logits = backbone(ids, torch.zeros_like(cols), cols, *n_prompt)  # (3, V)
    return logits[:, :N_LOGITS].float().cpu()


def check_probe(backbone: LanguageModel, kept: Tensor, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn if a model with the weights of a checkpoint gives other logits than it did when the checkpoint was written.

    Args:
        backbone: The model, its weights loaded.
        kept: The logits that `probe_logits` returned when the checkpoint was written.
        then: The versions of the libraries that wrote it, by name.
        now: The versions of the libraries that are running.
    """
    largest = max(1.0, float(kept.abs().max()))
    apart = float((probe_logits(backbone) - kept).abs().max())
    if apart <= TOLERANCE * largest:
        return
    changed = [f"{name} {then[name]} -> {version}" for name, version in now.items() if then.get(name) != version]
    same = "the same, so another device, dtype or model code"
    warnings.warn(
        f"The same weights give other logits than when the checkpoint was written: {apart:.3g} apart, where the "
        f"largest is {largest:.3g}. Versions: {', '.join(changed) or same}. "
        "Figures measured earlier may not hold: evaluate again, or install the versions that wrote it.",
        stacklevel=3,
    )
