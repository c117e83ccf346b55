"""A trained policy as a Hugging Face folder that transformers loads alone."""

from __future__ import annotations

import os
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .backbone import Backbone
from .files import replaced_folder
from .policies import LMPolicy


def export(
    model: BaseAlgorithm | LMPolicy, tokenizer: PreTrainedTokenizerBase | None, folder: str | os.PathLike[str]
) -> Path:
    """Write the language model (without value head) and tokenizer as `AutoModelForCausalLM` loads them.

    The folder appears whole or not at all; one that is there already is replaced when the new one is complete.

    Args:
        model: A trained model, or its policy.
        tokenizer: A Hugging Face tokenizer; None writes the model alone.
        folder: Where to.

    Returns:
        The folder.

    Raises:
        TypeError: If the policy is no `LMPolicy`, or the tokenizer cannot be saved.

    Example:
        >>> from agents import export
        >>> # export(model, tokenizer, "my-model"); AutoModelForCausalLM.from_pretrained("my-model")
    """
    policy = model if isinstance(model, LMPolicy) else model.policy
    if not isinstance(policy, LMPolicy):
        raise TypeError(f"Expected a model with an LMPolicy, got {type(policy).__name__}.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"Expected a Hugging Face tokenizer or None, got {type(tokenizer).__name__}.")
    backbone = policy.lm.backbone
    assert isinstance(backbone, Backbone), "LMPolicy builds no other"
    old = backbone.model.generation_config
    # What the checkpoint said about penalties and warping is no part of what was trained (invariant A4).
    plain = GenerationConfig(
        bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id
    )
    with replaced_folder(folder) as beside:
        with backbone.whole_model() as lm:
            lm.save_pretrained(beside)
        plain.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
    return Path(folder)
