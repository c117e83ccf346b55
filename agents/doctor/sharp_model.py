"""A model of random weights whose logits depend clearly on every token: fresh weights give nearly equal logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.pretrained import build_model

EMBEDDING = 0.35  # the deviation of embeddings: with it, logits of a tied head of 32 hidden units have about 2
GAIN = 1.2  # times 1 / sqrt(inputs): activations neither vanish nor blow up
NOISE = 0.1  # the deviation that biases and scales of norms get
LOGITS = 2.0  # the deviation of logits over the vocabulary; a head that is off by more than a factor of 2 is scaled


@dataclass(frozen=True)
class SharpModel:
    """A spec (see `LMSpec`) of a model with fresh weights that are large, random and the same for the same seed.

    Args:
        config: The config of a small model.
        seed: The seed of the weights.
    """

    config: PreTrainedConfig
    seed: int = 0

    def build(self) -> PreTrainedModel:
        """Return the model; torch's generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = build_model(self.config)
            sharpen(model)
        return model


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> None:
    """Draw all weights anew, in place: large enough that each token moves the logits, by whatever path.

    A family's own initialisation gives logits of about 0.1, or zeros where a layer starts switched off: they would not
    show a wrong mask or position.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for weight in model.parameters():
        if not weight.is_floating_point():
            continue
        if weight.dim() > 1:
            deviation = EMBEDDING if id(weight) in embeddings else GAIN * weight.shape[-1] ** -0.5
            weight.normal_(0, deviation)
        else:
            weight.copy_(torch.where(weight.isfinite() & (weight.abs() < 100), weight, 1.0))
            weight.add_(torch.randn_like(weight), alpha=NOISE)
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        return
    deviation = _deviation(model)
    if deviation is not None and not LOGITS / 2 <= deviation <= 2 * LOGITS:
        cast(Tensor, head.weight).mul_(LOGITS / deviation)


def _deviation(model: PreTrainedModel) -> float | None:
    """Return the deviation of the logits over the vocabulary; None if the model reads more than tokens."""
    ids = torch.arange(1, 7)[None]  # (1, 6)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    was_training = model.training
    model.eval()
    try:
        deviation = float(model(input_ids=ids, use_cache=False, **inputs).logits[0, -1].std())
    except Exception:  # models raise errors of every kind; the examination that follows reports them
        return None
    finally:
        model.train(was_training)
    return deviation if 0 < deviation < float("inf") else None
