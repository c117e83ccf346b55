"""The export of a trained policy as a Hugging Face folder, which transformers loads without this library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..distributed.collectives import by_main
from ..errors import CommandError, Exit
from ..models.backbone import Backbone
from ..models.trainable import merged_state_dict, uncompiled
from ..policies.lm_policy import LMPolicy
from .adapter_export import FOLDER, check_adapter, write_adapter
from .output_folders import output_folder


def export(
    model: BaseAlgorithm | LMPolicy,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    adapter: bool = False,
) -> Path:
    """Write the language model, without value head, and its tokenizer, for `AutoModelForCausalLM.from_pretrained`.

    Adapters (LoRA) are merged into the weights that are written; the policy keeps them apart and can train on.
    An encoder-decoder loads with `AutoModelForSeq2SeqLM`. `torch.compile` around the policy, the language model or
    modules of it leaves no trace.

    The folder appears whole or not at all. With several processes, all must call it: rank 0 writes, the others wait.

    Args:
        model: A trained model, or its policy.
        tokenizer: A Hugging Face tokenizer; None writes the model without one.
        folder: A folder that is absent or empty.
        overwrite: Whether an earlier export there may be replaced, once the new one is complete; nothing else ever is.
        adapter: Whether to write the adapter of LoRA alone, too, into `adapter/` in the folder, for
            `peft.PeftModel.from_pretrained(base, folder / "adapter")`.

    Returns:
        The folder.

    Raises:
        TypeError: If the policy is not an `LMPolicy`, or the tokenizer not a Hugging Face one.
        ValueError: If there are adapters on quantised weights, which cannot be merged, or none although `adapter` asks
            for them; an `OutputFolderError` if files in the folder would be lost.

    Example:
        >>> import tempfile
        >>> from agents import char_tokenizer, export, make_agent
        >>> from textenv import TextEnv
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> tokenizer = char_tokenizer(["abcd"])
        >>> env = TextEnv(["a", "bcd"], tokenizer, reward=lambda prompt, preds, done: 0.0, max_new_tokens=4)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40, bos_token_id=0, eos_token_id=0)
        >>> parent = tempfile.TemporaryDirectory()
        >>> folder = export(make_agent(env, config, n_envs=8, device="cpu"), tokenizer, f"{parent.name}/my-model")
        >>> AutoModelForCausalLM.from_pretrained(folder).config.model_type
        'gpt2'
        >>> parent.cleanup()
    """
    policy = uncompiled(model if isinstance(model, nn.Module) else model.policy)
    if not isinstance(policy, LMPolicy):
        raise TypeError(f"Expected a model with an LMPolicy, got {type(policy).__name__}.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"Expected a Hugging Face tokenizer or None, got {type(tokenizer).__name__}.")
    if adapter:
        check_adapter(policy.backbone.model)
    backbone = whole_backbone(policy)

    def write() -> None:
        with output_folder(folder, "language model", overwrite) as beside:
            write_model(backbone, tokenizer, beside)
            if adapter:
                write_adapter(backbone, beside / FOLDER)

    by_main(f"export {Path(folder).absolute()}", write)
    return Path(folder)


def whole_backbone(policy: LMPolicy) -> Backbone:
    """Return a policy's language model to write: of sharded weights a whole copy, in the memory of rank 0.

    All processes must call it; the others return the model as it is, which they must not write.
    """
    whole = None if policy.lm.shards is None else policy.lm.shards.whole()
    return policy.backbone if whole is None else cast("Backbone", whole.backbone)


def write_model(backbone: Backbone, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a language model with merged adapters, and a tokenizer, into an existing folder."""
    config, old = backbone.model.config, backbone.model.generation_config
    # The model's own `generation_config.json` may name penalties and warpers (top-k, temperature) that transformers'
    # `generate` would apply and the policy did not have in training: only the token ids are kept.
    plain = GenerationConfig(
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id if config.is_encoder_decoder else None,
    )
    with backbone.whole_model() as lm:
        lm.save_pretrained(folder, state_dict=merged_state_dict(lm))
    plain.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_repository(name: str) -> None:
    """Raise CommandError unless a name can be that of a repository on the Hugging Face hub, as "you/model"."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise CommandError(f"Expected the name of a repository, as you/model, got {name!r}: {error}") from error


def upload(folder: Path, repository: str) -> str:
    """Upload a folder to the Hugging Face hub in one commit, and return its URL there.

    A new repository is private, so that its owner sees the prompts and settings in it before others do. An existing
    repository keeps its visibility, and files of the same names are replaced.

    Raises:
        CommandError: If the upload fails; the folder stays.
    """
    api = HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="A model trained by textenv")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CommandError(
            f"Expected the hub to take {repository}, got: {reason} Log in with `hf auth login`; the folder {folder} is "
            f"whole, and `hf upload {repository} {folder}` sends it.",
            Exit.STORAGE,
        ) from error
    return str(made)
