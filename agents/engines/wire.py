"""Messages between two processes over torch.distributed: a JSON header and tensors, never pickles."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

LOOPBACK = "127.0.0.1"
MOST_BYTES = 1 << 26  # 64 MiB: the most bytes of tensors that share a message; a larger tensor travels alone
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)
} | {str(torch.bool): torch.bool}


class Wire:
    """One end of a connection between two processes of this machine, by gloo, through the host's memory.

    It has its own process group, and leaves torch's default group alone, by which `world` recognises processes that
    train together. It listens on the loopback address only.

    Args:
        store: The store through which the two ends find each other.
        rank: 0 for one end, 1 for the other.
        patience: The longest wait for a message of the other end.

    Raises:
        RuntimeError: From gloo, if the other end has ended or is silent for longer than `patience`.
    """

    def __init__(self, store: dist.Store, rank: int, patience: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = patience
        self.group: Any = dist.ProcessGroupGloo(store, rank, 2, options)
        self.other, self.patience = 1 - rank, patience

    def send(self, header: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Send a header, which must fit JSON, and tensors, from any device.

        Three kinds of messages go out: the header's length, the header, and groups of tensors as bytes.

        Raises:
            ValueError: If a tensor's dtype is not in `DTYPES`.
        """
        unknown = sorted({str(tensor.dtype) for tensor in tensors} - DTYPES.keys())
        if unknown:
            raise ValueError(f"Expected tensors of {', '.join(DTYPES)}, got {', '.join(unknown)}.")
        shapes = [(str(tensor.dtype), list(tensor.shape)) for tensor in tensors]
        text = json.dumps({**header, "tensors": shapes}).encode()
        self._put(torch.tensor([len(text)]).view(torch.uint8))  # (8,): the bytes of an int64
        self._put(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        for group in _groups([tensor.nbytes for tensor in tensors]):
            self._put(torch.cat([_bytes_of(tensors[index].detach().cpu().contiguous()) for index in group]))

    def receive(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Wait for a message, and return its header and its tensors, on the host."""
        text = self._take(int(self._take(8).view(torch.int64)))  # 8 bytes: the header's length
        header = json.loads(text.numpy().tobytes())
        tensors = [torch.empty(shape, dtype=DTYPES[name]) for name, shape in header.pop("tensors")]
        for group in _groups([tensor.nbytes for tensor in tensors]):
            sizes = [tensors[index].nbytes for index in group]
            for index, data in zip(group, self._take(sum(sizes)).split(sizes), strict=True):
                _bytes_of(tensors[index]).copy_(data)
        return header, tensors

    def _put(self, data: Tensor) -> None:
        self.group.send([data], self.other, 0).wait(self.patience)

    def _take(self, n_bytes: int) -> Tensor:
        data = torch.empty(n_bytes, dtype=torch.uint8)
        self.group.recv([data], self.other, 0).wait(self.patience)
        return data


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a view of a contiguous tensor as bytes, (n_bytes,) uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of the tensors that share a message, given their bytes: each message has a cost of its own."""
    group: list[int] = []
    for index, size in enumerate(sizes):
        if size == 0:
            continue
        if group and sum(sizes[other] for other in group) + size > MOST_BYTES:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


class Background(Generic[Result]):
    """A call that runs in a thread of its own, where it may wait in C++ for long.

    Args:
        call: The call; its error is raised by `result`.

    Example:
        >>> Background(lambda: 2 + 3).result()
        5
    """

    def __init__(self, call: Callable[[], Result]) -> None:
        self._results: list[Result] = []
        self._errors: list[BaseException] = []

        def run() -> None:
            try:
                self._results.append(call())
            except BaseException as error:
                self._errors.append(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self) -> Result:
        """Wait for the call, and return its result or raise its error; Ctrl-C interrupts the wait, not the call."""
        while self.thread.is_alive():
            self.thread.join(0.5)  # seconds: the longest until the main thread handles a signal
        if self._errors:
            raise self._errors[0]
        return self._results[0]
