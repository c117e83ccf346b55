"""The tensors of a checkpoint on disk; each process writes its shards, which any number of processes can read."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, zeros

from ..distributed.collectives import from_main, raise_together
from ..distributed.sharding import Shards
from ..distributed.world import is_main_process, world
from .manifest import CheckpointError

FOLDER = "shards"
Tensors = dict[str, dict[str, Tensor]]  # by the file's name, then by the tensor's


@contextmanager
def replaced_together(written: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield, in all processes, the folder of a context that only rank 0 enters; all processes must call it.

    An error in the body must be raised in all processes, as `once` and `raise_together` do: otherwise they would wait
    for each other forever.

    Args:
        written: The context that `replaced_folder` or `output_folder` returns.
    """
    with ExitStack() as opened:
        beside, error = Path(), None
        if is_main_process():
            try:
                beside = opened.enter_context(written)
            except (OSError, ValueError) as caught:
                error = caught
        raise_together(error)
        yield from_main("the folder of a checkpoint", beside)
        try:
            opened.close()  # on rank 0 this syncs the files and renames the folder; elsewhere nothing is open
        except OSError as caught:
            error = caught
        raise_together(error)


def write_shards(folder: Path, tensors: Tensors) -> Tensors:
    """Write the sharded tensors as safetensors, and return the others. All processes must call it.

    Args:
        folder: A folder that all processes see, on one disk.
        tensors: All tensors of the checkpoint.

    Raises:
        OSError: In all processes, if one of them cannot write.
    """
    here, sharded, whole = world(), {}, {}
    # torch's writer takes a flat dict: the key is "<file>/<name>", which `read_shards` splits again.
    for file, content in tensors.items():
        sharded.update({f"{file}/{name}": tensor for name, tensor in content.items() if isinstance(tensor, DTensor)})
        whole[file] = {name: tensor for name, tensor in content.items() if not isinstance(tensor, DTensor)}
    if sharded:
        assert here is not None, "only several processes have sharded tensors"
        writer = HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
        try:
            dcp.save(sharded, storage_writer=writer, process_group=here.files)
        except CheckpointException as error:  # torch raises it in all processes, whichever failed
            raise _storage_error(error) from error
    return whole


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    Raises:
        CheckpointError: If it is not a safetensors file.
    """
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: no safetensors ({error}).") from error


def read_shards(folder: Path, shards: Shards | None) -> Tensors:
    """Return the sharded tensors that `write_shards` wrote.

    Args:
        folder: The checkpoint.
        shards: The shards of the policy: each process reads its own part of each tensor. None reads whole tensors.
    """
    if not (folder / FOLDER).is_dir():
        return {}
    here, reader = world(), HuggingFaceStorageReader(str(folder / FOLDER))
    target: dict[str, Tensor] = {}  # torch reads into tensors of the right shapes, which are made here
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), "safetensors have nothing else"
        if shards is None:
            target[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
        else:
            placing: dict[str, Any] = {"device_mesh": shards.mesh, "placements": shards.placements}
            target[name] = zeros(entry.size, dtype=entry.properties.dtype, **placing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what `no_dist` asks for
        dcp.load(target, storage_reader=reader, process_group=here and here.files, no_dist=here is None)
    tensors: Tensors = {}
    for key, tensor in target.items():
        file, _, name = key.partition("/")
        tensors.setdefault(file, {})[name] = tensor
    return tensors


def _storage_error(error: CheckpointException) -> OSError:
    """Return torch's error as an OSError, with the error number and the messages of the processes that failed."""
    causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    number = next((cause.errno for cause in causes.values() if isinstance(cause, OSError) and cause.errno), errno.EIO)
    texts = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
    return OSError(number, f"Expected to write the shards of all processes, got {texts}")
