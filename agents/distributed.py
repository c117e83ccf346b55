"""Several processes that train one policy: how they meet, and agree on figures and errors."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

Value = TypeVar("Value")
Owner = TypeVar("Owner")

JOIN_SECONDS = 300.0  # how long processes wait for each other at the start
AGREE = timedelta(hours=4)  # the longest that one waits for another, which may be in an evaluation
LEAVE_SECONDS = 10.0  # how long the process that serves the others waits for them at its end
ANSWER_SECONDS = 5.0  # how long the others have to say that they live when one seems lost


class ProcessLost(RuntimeError):
    """Another process of the job has ended, or does not answer."""


class World(NamedTuple):
    """The processes of a job, seen from one of them.

    Attributes:
        rank: The number of this process; 0 logs, evaluates and writes.
        size: How many there are.
        seed: A number that all share, fresh for each job.
        store: Where each finds what the others have left.
        group: Through which they agree, on the host: gloo.
    """

    rank: int
    size: int
    seed: int
    store: dist.Store
    group: dist.ProcessGroup


_joined: list[World] = []
_written: Counter[str] = Counter()
_helpers: dict[str, Callable[[], None]] = {}  # what to run when others are at something that needs all
_offered: list[str] = []  # the turns that have ever been: as many in all processes


def world() -> World | None:
    """Return the processes that train together, or None where this one trains alone.

    `torchrun`, `accelerate launch` and job schedulers say by environment variables (WORLD_SIZE, RANK, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT) that there are several. The first call joins them, and waits until all have come; a
    process group that the script has initialised itself is used as it is.

    Raises:
        ValueError: If a variable is missing or no number, or the processes have been told different numbers.
        TimeoutError: If not all have come after five minutes.

    Example:
        >>> from agents.distributed import world
        >>> world() is None  # one process
        True
    """
    if not _joined and (dist.is_initialized() or variable("WORLD_SIZE", 1) > 1):
        _joined.append(_join())
    return _joined[0] if _joined and _joined[0].size > 1 else None


def is_main_process() -> bool:
    """Whether this process logs, evaluates and writes for all: the one of rank 0, or the only one.

    Example:
        >>> from agents import is_main_process
        >>> if is_main_process():
        ...     print("the table is printed once")
        the table is printed once
    """
    here = world()
    return here is None or here.rank == 0


def variable(name: str, default: int | None = None) -> int:
    """Return a number that a launcher has put into the environment.

    Raises:
        ValueError: If it is no number, or not there and there is no default.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(
            f"Expected the environment variable {name} to be a number in each of several processes, got {text!r}: "
            "start the script with `torchrun --nproc_per_node 2 train.py` or `accelerate launch`, which set it."
        )
    return int(text)


def _join() -> World:
    """Meet the others, and make the process group where there is none."""
    if torch.cuda.is_available() and variable("LOCAL_RANK", 0) < torch.cuda.device_count():
        torch.cuda.set_device(variable("LOCAL_RANK", 0))  # what "cuda" means from now on
    if dist.is_initialized():
        rank, size, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    else:
        rank, size = variable("RANK"), variable("WORLD_SIZE")
        store = _meet(rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        atexit.register(leave, store, rank, size)
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    group = dist.new_group(backend="gloo", timeout=AGREE)
    assert group is not None, "this process is a member"
    seed = [int(np.random.SeedSequence().generate_state(1)[0]) >> 1]
    dist.broadcast_object_list(seed, group=group)
    return World(rank, size, seed[0], dist.PrefixStore("textenv", store), group)


def _meet(rank: int, size: int) -> dist.Store:
    """Return the store of all processes once each has come and been told the same number of processes."""
    if not 0 <= rank < size:
        raise ValueError(f"Expected RANK from 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}.")
    host, port = os.environ.get("MASTER_ADDR"), variable("MASTER_PORT")
    if not host:
        raise ValueError(f"Expected MASTER_ADDR, the host of rank 0, beside WORLD_SIZE={size}, got none.")
    serves = _serves(rank)
    seconds = timedelta(seconds=JOIN_SECONDS)
    try:
        base = dist.TCPStore(
            host, port, size, is_master=serves, timeout=seconds, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        does = "to open" if serves else f"within {JOIN_SECONDS:.0f} s an answer of rank 0 at"
        raise TimeoutError(f"Expected {does} {host}:{port} (MASTER_ADDR, MASTER_PORT), got: {error}") from error
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", base)
    refusal = _refusal(store, rank, size)
    if refusal is not None:
        if serves:
            time.sleep(1.0)  # the others read it here
        raise refusal
    return store


def _serves(rank: int) -> bool:
    """Whether the store that all look at is this process's: not where `torchrun` has one, which serves all restarts."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def leave(store: dist.Store, rank: int, size: int) -> None:
    """At the end of a process: the one that serves the store stays a while for those that still look into it."""
    deadline, others = time.monotonic() + LEAVE_SECONDS, [f"left {other}" for other in range(size)]
    with suppress(dist.DistError):  # it has gone already
        store.set(f"left {rank}", "1")
        while _serves(rank) and time.monotonic() < deadline and not store.check(others):
            time.sleep(0.05)


def _refusal(store: dist.Store, rank: int, size: int) -> Exception | None:
    """Wait until all have come, and return what is wrong with them."""
    deadline, missing = time.monotonic() + JOIN_SECONDS, list(range(size))
    try:
        first = int(store.compare_set("size", "", str(size)))
        if first != size:
            store.set("refused", f"rank {rank} was told WORLD_SIZE={size}, and the first to come {first}")
        if store.add(f"rank {rank}", 1) > 1:
            store.set("refused", f"two processes were told RANK={rank}")
        while missing and time.monotonic() < deadline:
            if store.check(["refused"]):
                reason = store.get("refused").decode()
                return ValueError(f"Expected {size} processes, with the same WORLD_SIZE and a RANK each, but {reason}.")
            missing = [other for other in range(size) if not store.check([f"rank {other}"])]
            time.sleep(0.05)
    except dist.DistError:  # rank 0, which serves, has given up before
        missing = missing or [0]
    if missing:
        return TimeoutError(f"Expected {size} processes within {JOIN_SECONDS:.0f} s, got none of rank {missing}.")
    return None


def gather(what: str, value: Value) -> list[Value]:
    """Return what each process has, by rank: [value] where there is one process. All must call it, for the same thing.

    Raises:
        ProcessLost: If another process has ended, with its rank.
        RuntimeError: If another process is at something else.
    """
    here = world()
    if here is None:
        return [value]
    while True:
        found: list[Any] = [None] * here.size
        _together(here, lambda found=found: dist.all_gather_object(found, (what, value), group=here.group))  # type: ignore[misc]
        turn = next((theirs for theirs, _ in found if theirs in _helpers), None)
        if turn is None or turn == what:
            break
        _helpers[turn]()
    if turn is not None:
        return [value]
    for rank, (theirs, _) in enumerate(found):
        if theirs != what:
            raise RuntimeError(
                f"Expected all processes at the same, got rank {rank} at {theirs!r} and rank {here.rank} at {what!r}. "
                "`if is_main_process()` may stand around what prints or writes, not around what builds, trains, checks "
                "or saves an agent."
            )
    return [value for _, value in found]


def offer_help(owner: Owner, work: Callable[[Owner], None]) -> str:
    """Say what this process does, as long as `owner` lives, when others are at something that all must take part in.

    Returns:
        The name of their turn, for `take_turn`: the same in all processes that offer the same things in the same order.
    """
    name, reference = f"turn {len(_offered)}", weakref.ref(owner)
    _offered.append(name)

    def help_others() -> None:
        here = reference()
        assert here is not None, "else the name is gone"
        work(here)

    _helpers[name] = help_others
    weakref.finalize(owner, _helpers.pop, name, None)
    return name


def take_turn(name: str) -> None:
    """Return when all others do the same, or take part in it by what they have offered.

    Whoever waits for the others, in any function of this file, helps meanwhile; so each may have as many turns as it
    needs, and no two need the same number.
    """
    gather(name, None)


def from_main(what: str, value: Value) -> Value:
    """Return what the process of rank 0 has. All must call it, as `gather`."""
    return gather(what, value)[0]


def raise_together(error: Exception | None) -> None:
    """Raise an error where it is, and say of which process it is in the others, so that none waits for it.

    Raises:
        Exception: The error given, if one is.
        ProcessLost: In the others.
    """
    said = gather("an error", None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            raise ProcessLost(f"Rank {rank} of {len(said)} processes stopped: {text}")


def once(write: Callable[[], Any]) -> None:
    """Do what writes for all, in the process of rank 0; the others wait, and share its error. All must call it."""
    error = None
    if is_main_process():
        try:
            write()
        except Exception as caught:
            error = caught
    raise_together(error)


def by_main(name: str, write: Callable[[], Any]) -> None:
    """Do what writes for all in the process of rank 0, which waits for nobody; others that call it wait for rank 0.

    Args:
        name: What is written: calls of the same name belong together, the first of each process, the second, ...
        write: What writes.
    """
    here = world()
    if here is None:
        write()
        return
    if _offered:  # what writes may need the others: they wait where they can help
        try:
            if here.rank == 0:
                write()
        finally:
            gather(f"writing {name}", None)
        return
    _written[name] += 1
    key = f"written {_written[name]} {name}"
    if here.rank > 0:
        here.store.wait([key], AGREE)
        return
    try:
        write()
    finally:
        here.store.set(key, "1")


def _together(here: World, call: Callable[[], Any]) -> None:
    """Do what needs all processes; where one is lost, say which."""
    try:
        call()
    except RuntimeError as error:  # gloo's: a connection was closed, or nothing came in time
        raise ProcessLost(f"Expected {here.size} processes, got no answer of {_silent(here)}: {error}") from error


def _silent(here: World) -> str:
    """Return which processes do not say within a few seconds that they live."""
    deadline, others = time.monotonic() + ANSWER_SECONDS, range(here.size)
    try:
        here.store.set(f"lives {here.rank}", "1")
        while (lost := [rank for rank in others if not here.store.check([f"lives {rank}"])]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
    except RuntimeError:  # the store was that of rank 0
        return "rank 0"
    return "rank " + ", ".join(map(str, lost)) if lost else "one that is busy"


class Moments(NamedTuple):
    """Of numbers that are spread over the processes."""

    n: int
    mean: float
    variance: float  # the mean square of the distances to the mean


def moments(what: str, values: np.ndarray) -> Moments:
    """Return the moments of the numbers of all processes, (N,) each, in float64 (Chan et al., 1983, equation 2.1).

    Example:
        >>> import numpy as np
        >>> from agents.distributed import moments
        >>> moments("lengths", np.array([1.0, 3.0]))
        Moments(n=2, mean=2.0, variance=1.0)
    """
    numbers = np.asarray(values, dtype=np.float64)
    mean = float(numbers.mean()) if len(numbers) else 0.0
    own = len(numbers), mean, float(((numbers - mean) ** 2).sum())
    count, total, squares = 0, 0.0, 0.0
    for n, their_mean, their_squares in gather(what, own):
        if n > 0:
            distance = their_mean - total
            squares += their_squares + distance**2 * count * n / (count + n)
            total += distance * n / (count + n)
            count += n
    return Moments(count, total, squares / max(count, 1))


def broadcast_weights(module: nn.Module) -> None:
    """Give all processes the weights and buffers of rank 0, where there are several.

    Raises:
        ValueError: If some are offloaded.
    """
    here = world()
    if here is None:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta:
            raise ValueError(
                "Expected weights in memory in several processes, got some that `device_map` has offloaded."
            )
        copy = tensor.detach().cpu().contiguous()
        _together(here, lambda copy=copy: dist.broadcast(copy, 0, group=here.group))  # type: ignore[misc]
        with torch.no_grad():
            tensor.copy_(copy)
