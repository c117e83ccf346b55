"""Agreement among the processes that train one policy: about values, errors, weights and the process that writes."""

from __future__ import annotations

import hashlib
import pickle
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .hangs import ProcessLost, pause
from .world import POLL_SECONDS, World, is_main_process, world

Value = TypeVar("Value")
Owner = TypeVar("Owner")

AN_ERROR = "an error"  # the name of what `raise_together` gathers
ANSWER_SECONDS = 5.0  # how long processes have to show that they are alive once one seems lost


class ProcessStopped(ProcessLost):
    """The error of the other processes when one has raised an error that it told them of.

    Args:
        message: The rank of the process, and what its error says.
        is_of_files: Whether it is an `OSError`, such as that of a full disk.
    """

    def __init__(self, message: str, is_of_files: bool = False) -> None:  # by default: pickle passes the message alone
        super().__init__(message)
        self.is_of_files = is_of_files


def gather(name: str, value: Value) -> list[Value]:
    """Return the values of all processes, by rank; [value] if there is one process.

    All processes must call it, with the same name.

    Args:
        name: The name of the values, by which processes notice that they have reached different calls.
        value: The value of this process: anything that can be pickled.

    Raises:
        ProcessLost: If another process has ended or hangs, with its rank, or waits in `raise_together` with an error,
            with the error's text.
        RuntimeError: If another process has called it with another name.

    Example:
        >>> from agents.distributed.collectives import gather
        >>> gather("a length", 3)  # one process
        [3]
    """
    here = world()
    if here is None:
        return [value]
    while True:
        answers = _exchange(here, name, value)
        turn = next((theirs for theirs, _ in answers if theirs in here.turns), None)
        if turn is None or turn == name:
            break
        here.turns[turn]()  # another process takes its turn: help it, and then gather again
    if turn is not None:
        return [value]  # this process takes the turn, and the others help: their names differ
    if name == AN_ERROR and value is not None:
        return [value]  # this process raises its own
    for rank, (theirs, error) in enumerate(answers):
        if theirs == AN_ERROR != name and error is not None:
            raise _stopped(rank, here.size, error)
    for rank, (theirs, _) in enumerate(answers):
        if theirs != name:
            raise RuntimeError(
                f"Expected all processes at the same, got rank {rank} at {theirs!r} and rank {here.rank} at {name!r}. "
                "Put `if is_main_process()` around code that prints or writes, not around code that builds, trains, "
                "checks or saves an agent."
            )
    return [value for _, value in answers]


def offer_help(owner: Owner, work: Callable[[Owner], None]) -> str:
    """Offer work that this process does, as long as `owner` lives, whenever others take a turn that needs all.

    Args:
        owner: The object that the work belongs to. Only a weak reference to it is kept.
        work: Takes part in the turn, given the owner.

    Returns:
        The name of the turn, for `take_turn`: the same in all processes that offer the same things in the same order.
    """
    here, reference = world(), weakref.ref(owner)
    assert here is not None, "several processes"
    name = f"turn {here.n_turns}"
    here.n_turns += 1

    def help_others() -> None:
        alive = reference()
        assert alive is not None, "its turn is withdrawn when the owner ends"
        work(alive)

    here.turns[name] = help_others
    weakref.finalize(owner, here.turns.pop, name, None)
    return name


def take_turn(name: str) -> None:
    """Wait until each other process takes the same turn too, or helps with it by the work that it has offered.

    A process that waits for the others, in any function of this file, helps meanwhile. So each process may take as many
    turns as it needs, and the numbers may differ.
    """
    gather(name, None)


def from_main(name: str, value: Value) -> Value:
    """Return the value of rank 0. All processes must call it, as they do `gather`."""
    return gather(name, value)[0]


def raise_together(error: Exception | None) -> None:
    """Raise this process's error, and a `ProcessStopped` that quotes it in the other processes.

    All processes must call it, so that none keeps waiting for one that has failed. A process that fails where the
    others do not call it may call it as well: it waits until they reach their next `gather`, which raises there.

    Args:
        error: The error of this process; None if all went well.

    Raises:
        Exception: `error`, unless it is None.
        ProcessStopped: In the other processes, with the rank and the error's text.
    """
    own = None if error is None else (f"{type(error).__name__}: {error}", isinstance(error, OSError))
    errors = gather(AN_ERROR, own)
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            raise _stopped(rank, len(errors), other)


def _stopped(rank: int, size: int, error: tuple[str, bool]) -> ProcessStopped:
    text, is_of_files = error
    return ProcessStopped(f"Rank {rank} of {size} processes stopped: {text}", is_of_files)


def once(write: Callable[[], Any]) -> None:
    """Call `write` in the process of rank 0; the others wait, and raise if it fails. All processes must call it."""
    error = None
    if is_main_process():
        try:
            write()
        except Exception as caught:
            error = caught
    raise_together(error)


def by_main(name: str, write: Callable[[], Any]) -> None:
    """Call `write` in the process of rank 0, which waits for nobody; others that call this wait for rank 0.

    Args:
        name: The name of the file or folder. The first calls of all processes with a name belong together, then the
            second calls, and so on.
        write: The function that writes.
    """
    here = world()
    if here is None:
        write()
        return
    if here.n_turns > 0:  # `write` may need the others (sharded weights): they wait where they can help
        try:
            if here.rank == 0:
                write()
        finally:
            gather(f"writing {name}", None)
        return
    here.n_written[name] += 1
    key = f"written {here.n_written[name]} {name}"
    if here.rank > 0:
        with here.watch.waiting(f"writing {name}"):
            while not here.store.check([key]):
                here.watch.check()
                time.sleep(POLL_SECONDS)
        return
    try:
        write()
    finally:
        here.store.set(key, "1")


def _exchange(here: World, name: str, value: Any) -> list[tuple[str, Any]]:
    """Return the names and values of all processes, by rank."""
    message = torch.frombuffer(bytearray(pickle.dumps((name, value))), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(here.size)]
    own = torch.tensor([len(message)])
    _together(here, name, lambda: dist.all_gather(lengths, own, group=here.group, async_op=True))
    longest = max(map(int, lengths))
    messages = [torch.empty(longest, dtype=torch.uint8) for _ in range(here.size)]
    padded = torch.nn.functional.pad(message, (0, longest - len(message)))
    _together(here, name, lambda: dist.all_gather(messages, padded, group=here.group, async_op=True))
    return [pickle.loads(text.numpy().tobytes()) for text in messages]  # each ends where its pickle does


def _together(here: World, name: str, begin: Callable[[], Any]) -> None:
    """Wait for work of gloo that needs all processes; if one of them is lost or hangs, raise an error with its rank."""
    with here.watch.waiting(name):
        try:
            work = begin()
            while not _ends_soon(work, pause(here.watch.timeout)):
                here.watch.check()
            return
        except ProcessLost:
            raise
        except RuntimeError as error:  # gloo's: a connection was closed
            lost = error
    raise ProcessLost(f"Expected {here.size} processes, got no answer of {silent_ranks(here)}: {lost}") from lost


def _ends_soon(work: Any, seconds: float) -> bool:
    """Wait some seconds for work of gloo, and return whether it has ended; raise its error if it has failed."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:  # the seconds are over, or it has failed
        if not work.is_completed():
            return False
        work.wait()
    return True


def silent_ranks(here: World) -> str:
    """Return the ranks that do not show within a few seconds that they are alive, as words."""
    deadline, others = time.monotonic() + ANSWER_SECONDS, range(here.size)
    try:
        here.store.set(f"lives {here.rank}", "1")
        while (lost := [rank for rank in others if not here.store.check([f"lives {rank}"])]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
    except RuntimeError:  # the store is gone, and with it rank 0, which served it
        return "rank 0"
    return "rank " + ", ".join(map(str, lost)) if lost else "a process that is busy"


class Spread(NamedTuple):
    """The moments of numbers in a form in which those of two sets can be merged."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0  # the sum of squared distances to the mean

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Return the moments of numbers (N,), in float64."""
        numbers = np.asarray(values, dtype=np.float64)
        mean = float(numbers.mean()) if len(numbers) else 0.0
        return cls(len(numbers), mean, float(((numbers - mean) ** 2).sum()))


def merge_moments(first: Spread, second: Spread) -> Spread:
    """Return the moments of two sets of numbers taken together (Chan et al., 1983, equation 2.1).

    Example:
        >>> import numpy as np
        >>> from agents.distributed.collectives import Spread, merge_moments
        >>> merge_moments(Spread.of(np.array([1.0, 3.0])), Spread.of(np.array([8.0])))
        Spread(n=3, mean=4.0, squares=26.0)
    """
    n = first.n + second.n
    if second.n == 0:
        return first
    distance = second.mean - first.mean
    squares = first.squares + (second.squares + distance**2 * first.n * second.n / n)
    return Spread(n, first.mean + distance * second.n / n, squares)


class Moments(NamedTuple):
    """The moments of numbers that are spread over the processes."""

    n: int
    mean: float
    variance: float  # the mean of the squared distances to the mean: divided by n, not by n - 1


def moments(name: str, values: np.ndarray) -> Moments:
    """Return the moments of the numbers of all processes, (N,) each, in float64. All processes must call it.

    Args:
        name: The name of the numbers, as for `gather`.
        values: The numbers of this process; there may be none.

    Example:
        >>> import numpy as np
        >>> from agents.distributed.collectives import moments
        >>> moments("lengths", np.array([1.0, 3.0]))
        Moments(n=2, mean=2.0, variance=1.0)
    """
    merged = reduce(merge_moments, gather(name, Spread.of(values)), Spread())
    return Moments(merged.n, merged.mean, merged.squares / max(merged.n, 1))


def broadcast_weights(module: nn.Module) -> None:
    """Copy the weights and buffers of rank 0 to all other processes, those that are not the same already.

    Weights that transformers has mapped from a file are mostly the same. They are not written to: a page of a mapped
    file that is written to becomes memory of this process.

    Raises:
        ValueError: If some are offloaded.
    """
    here = world()
    if here is None:
        return
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        if tensor.is_meta:
            raise ValueError(
                "Expected weights in memory in several processes, got some that `device_map` has offloaded."
            )
    ours = [_digest(tensor) for tensor in tensors]
    theirs = gather("the weights", ours)
    for i, tensor in enumerate(tensors):
        if all(digests[i] == ours[i] for digests in theirs):
            continue
        copy = tensor.detach().cpu().contiguous()  # gloo works on the host
        _together(
            here,
            "the weights of rank 0",
            lambda copy=copy: dist.broadcast(copy, 0, group=here.group, async_op=True),  # type: ignore[misc]
        )
        with torch.no_grad():
            tensor.copy_(copy)


def _digest(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's type, shape and bytes."""
    digest = hashlib.blake2b(repr((tensor.dtype, tensor.shape)).encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
