"""The policy of a checkpoint alone, to write and not to be trained: nothing else of what was saved is read."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .checkpoint import check_same_shapes, named_tensors
from .files import restore_folder
from .manifest import of_our_making, verify_checkpoint
from .policies import LMPolicy
from .shard_files import read_shards, read_tensors
from .sharding import placed

CRITIC = "lm.critic."  # how the names of its weights begin


def load_policy(policy: LMPolicy, folder: str | os.PathLike[str]) -> None:
    """Bring a policy to the saved one's weights; critics are left as they are.

    Raises:
        CheckpointError: If a file is missing, damaged or of another model.
    """
    path = Path(folder)
    restore_folder(path)
    verify_checkpoint(path)
    with of_our_making(path):
        saved = {**read_tensors(path / "policy.safetensors"), **read_shards(path, policy.lm.shards).get("policy", {})}
        weights = {name: tensor for name, tensor in named_tensors(policy) if not name.startswith(CRITIC)}
        found = {name: tensor for name, tensor in saved.items() if not name.startswith(CRITIC)}
        check_same_shapes(weights, found)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(placed(found[name], weight))
