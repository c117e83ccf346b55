"""Tensors on disk, also sharded ones: each process writes its part, and any number of processes reads them."""

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

from .distributed import from_main, raise_together
from .manifest import CheckpointError
from .sharding import Shards
from .world import is_main_process, world

FOLDER = "shards"
Tensors = dict[str, dict[str, Tensor]]  # by file, by name


@contextmanager
def replaced_together(written: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield in all processes the folder that the one of rank 0 enters; all must call it.

    What goes wrong in the body must do so in all of them, as what `once` and `raise_together` raise does.

    Args:
        written: What `replaced_folder` or `output_folder` returns; entered in the process of rank 0 alone.
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
            opened.close()
        except OSError as caught:
            error = caught
        raise_together(error)


def write_shards(folder: Path, tensors: Tensors) -> Tensors:
    """Write what is sharded as safetensors, to be read by a path that all processes see; return what is not.

    All processes must call it.
    """
    here, sharded, whole = world(), {}, {}
    for file, content in tensors.items():
        sharded.update({f"{file}/{name}": one for name, one in content.items() if isinstance(one, DTensor)})
        whole[file] = {name: one for name, one in content.items() if not isinstance(one, DTensor)}
    if sharded:
        assert here is not None, "several processes"
        writer = HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
        try:
            dcp.save(sharded, storage_writer=writer, process_group=here.group)
        except CheckpointException as error:  # in all processes, of whichever
            raise _storage_error(error) from error
    return whole


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    Raises:
        CheckpointError: If it is not of safetensors.
    """
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: no safetensors ({error}).") from error


def read_shards(folder: Path, shards: Shards | None) -> Tensors:
    """Return what `write_shards` wrote, each process its part of it, or all of it where nothing is sharded here."""
    if not (folder / FOLDER).is_dir():
        return {}
    here, reader = world(), HuggingFaceStorageReader(str(folder / FOLDER))
    target: dict[str, Tensor] = {}
    for name, one in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(one, TensorStorageMetadata), "safetensors have nothing else"
        if shards is None:
            target[name] = torch.zeros(one.size, dtype=one.properties.dtype)
        else:
            placing: dict[str, Any] = {"device_mesh": shards.mesh, "placements": shards.placements}
            target[name] = zeros(one.size, dtype=one.properties.dtype, **placing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant, in one process
        dcp.load(target, storage_reader=reader, process_group=here and here.group, no_dist=here is None)
    tensors: Tensors = {}
    for key, tensor in target.items():
        file, _, name = key.partition("/")
        tensors.setdefault(file, {})[name] = tensor
    return tensors


def _storage_error(error: CheckpointException) -> OSError:
    """Return what went wrong with files as that, whichever process it happened in."""
    causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    number = next((one.errno for one in causes.values() if isinstance(one, OSError) and one.errno), errno.EIO)
    said = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
    return OSError(number, f"Expected to write the shards of all processes, got {said}")
