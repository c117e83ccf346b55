"""Messages between two processes over torch.distributed: a JSON header and tensors, never pickles."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOOPBACK = "127.0.0.1"
MOST_BYTES = 1 << 26  # of tensors that are copied into one message; a larger one travels alone
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)
} | {str(torch.bool): torch.bool}


class Wire:
    """One end of a line between two processes of this machine, in gloo, through the host's memory.

    It is a process group of its own: torch's default one, by which processes that train together are recognised, is
    left alone. It listens on the loopback address only.

    Args:
        store: Where both ends find each other.
        rank: 0 or 1.
        patience: How long a message of the other end may take.

    Raises:
        RuntimeError: From gloo, where the other end has gone or is silent for too long.
    """

    def __init__(self, store: dist.Store, rank: int, patience: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = patience
        self.group: Any = dist.ProcessGroupGloo(store, rank, 2, options)
        self.other, self.patience = 1 - rank, patience

    def send(self, header: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Send a header, which must fit JSON, and tensors from whatever device."""
        unknown = sorted({str(tensor.dtype) for tensor in tensors} - DTYPES.keys())
        if unknown:
            raise ValueError(f"Expected tensors of {', '.join(DTYPES)}, got {', '.join(unknown)}.")
        shapes = [(str(tensor.dtype), list(tensor.shape)) for tensor in tensors]
        text = json.dumps({**header, "tensors": shapes}).encode()
        self._put(torch.tensor([len(text)]).view(torch.uint8))
        self._put(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        for places in _together([tensor.nbytes for tensor in tensors]):
            self._put(torch.cat([_bytes_of(tensors[place].detach().cpu().contiguous()) for place in places]))

    def receive(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Wait for a message; its tensors are on the host."""
        text = self._take(int(self._take(8).view(torch.int64)))
        header = json.loads(text.numpy().tobytes())
        tensors = [torch.empty(shape, dtype=DTYPES[name]) for name, shape in header.pop("tensors")]
        for places in _together([tensor.nbytes for tensor in tensors]):
            parts = self._take(sum(tensors[place].nbytes for place in places)).split(
                [tensors[p].nbytes for p in places]
            )
            for place, part in zip(places, parts, strict=True):
                _bytes_of(tensors[place]).copy_(part)
        return header, tensors

    def _put(self, data: Tensor) -> None:
        self.group.send([data], self.other, 0).wait(self.patience)

    def _take(self, n_bytes: int) -> Tensor:
        data = torch.empty(n_bytes, dtype=torch.uint8)
        self.group.recv([data], self.other, 0).wait(self.patience)
        return data


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _together(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the places of tensors that travel together, given their bytes: each message costs a busy machine time."""
    places: list[int] = []
    for place, size in enumerate(sizes):
        if size == 0:
            continue
        if places and sum(sizes[one] for one in places) + size > MOST_BYTES:
            yield places
            places = []
        places.append(place)
    if places:
        yield places


def interruptible(call: Callable[[], Any]) -> Any:
    """Return what a call returns that may wait in C++ for long, so that Ctrl-C is noticed meanwhile."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
    if errors:
        raise errors[0]
    return results[0]
