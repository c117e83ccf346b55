"""The loading of a policy from a checkpoint for writing texts only, without optimizer, critic and episodes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..distributed.sharding import placed
from ..files import restore_folder
from ..policies.lm_policy import LMPolicy
from .checkpoint import check_same_shapes, named_tensors
from .manifest import of_our_making, verify_checkpoint
from .shard_files import read_shards, read_tensors

CRITIC = "lm.critic."  # the start of the names of a critic's weights


def load_policy(policy: LMPolicy, folder: str | os.PathLike[str]) -> None:
    """Load the saved weights into a policy, except those of its critic, which stays as it is.

    Args:
        policy: A policy built like the saved one; its critic may differ.
        folder: The checkpoint.

    Raises:
        CheckpointError: If a file is missing, damaged or of another model.
    """
    path = Path(folder)
    restore_folder(path)
    verify_checkpoint(path)
    with of_our_making(path):
        saved = {**read_tensors(path / "policy.safetensors"), **read_shards(path, policy.lm.shards).get("policy", {})}
        weights = {name: tensor for name, tensor in named_tensors(policy) if not name.startswith(CRITIC)}
        read = {name: tensor for name, tensor in saved.items() if not name.startswith(CRITIC)}
        check_same_shapes(weights, read)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(placed(read[name], weight))
