"""The processes of a job: their meeting, by the environment variables of a launcher, and their end."""

from __future__ import annotations

import atexit
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .hangs import VARIABLE, Watch, pause, timeout_from_environment

JOIN_SECONDS = 300.0  # how long processes wait for each other at the start: some load a model on a busy machine first
FOR_EVER = timedelta(days=365)  # a process that waits by `collectives` is ended by its watch, not by gloo
LEAVE_SECONDS = 10.0  # how long the process that serves the store waits for the others before it ends
OWN_KEYS = "textenv"  # the prefix of the keys of `World.store`
POLL_SECONDS = 0.05  # the pause between two looks into the store


@dataclass(eq=False)
class World:
    """The processes of a job, as one of them sees them, and the counters that they have in common.

    Attributes:
        rank: The number of this process; rank 0 logs, measures and writes.
        size: The number of processes.
        seed: A number that all processes share, new for each job.
        store: The key-value store through which the processes leave each other short messages.
        group: The process group (gloo, on the host) through which they agree.
        files: Another such group, through which torch agrees on files of shards, with the timeout of the watch.
        watch: The watch that names a process that hangs.
        n_written: How often `by_main` has written each name: the same in all processes.
        turns: By name, the work that this process does when others take that turn (`offer_help`).
        n_turns: The number of turns offered so far: the same in all processes.
        warned: The warnings of this process that the others do not know yet (`warned.warnings_noted`).
        known_warnings: The kinds of warnings that rank 0 has given: the same in all processes.
    """

    rank: int
    size: int
    seed: int
    store: dist.Store
    group: dist.ProcessGroup
    files: dist.ProcessGroup
    watch: Watch
    n_written: Counter[str] = field(default_factory=Counter)
    turns: dict[str, Callable[[], None]] = field(default_factory=dict)
    n_turns: int = 0
    warned: list[str] = field(default_factory=list)
    known_warnings: set[str] = field(default_factory=set)


_joined: World | None = None  # the job of this process, from the first call of `world` to the end of the process


def world() -> World | None:
    """Return the processes that train together, or None if this process trains alone.

    `torchrun`, `accelerate launch` and job schedulers announce several processes by environment variables (WORLD_SIZE,
    RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). The first call joins the processes, and waits until all have come; a
    process group that the script has initialised itself is used as it is. `TEXTENV_TIMEOUT` is the number of seconds,
    1800 by default, after which a process that makes no progress, while others wait for it, is named by an error.

    Raises:
        ValueError: If a variable is missing or not a number, or the processes have different values of WORLD_SIZE or
            of TEXTENV_TIMEOUT, or the same RANK.
        TimeoutError: If not all processes have come after five minutes.

    Example:
        >>> from agents.distributed.world import world
        >>> world() is None  # one process
        True
    """
    global _joined
    if _joined is None and (dist.is_initialized() or _number_from_environment("WORLD_SIZE", 1) > 1):
        _joined = _join()
    return None if _joined is None or _joined.size == 1 else _joined


def joined() -> World | None:
    """Return the processes that this process has met already; None if it trains alone, or has not met the others."""
    return None if _joined is None or _joined.size == 1 else _joined


def is_main_process() -> bool:
    """Return whether this process logs, measures and writes for all: it has rank 0, or is the only one.

    Example:
        >>> from agents import is_main_process
        >>> if is_main_process():
        ...     print("the table is printed once")
        the table is printed once
    """
    here = world()
    return here is None or here.rank == 0


def _number_from_environment(name: str, default: int | None = None) -> int:
    """Return a number that a launcher has put into the environment.

    Raises:
        ValueError: If it is not a number, or is missing and has no default.
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
    """Meet the other processes, and make the process group unless the script has made one."""
    if torch.cuda.is_available() and _number_from_environment("LOCAL_RANK", 0) < torch.cuda.device_count():
        torch.cuda.set_device(_number_from_environment("LOCAL_RANK", 0))  # "cuda" means this device from now on
    timeout = timeout_from_environment()
    # Somewhat later than the watch, which names the process that hangs; torch's error does not.
    later = timedelta(seconds=timeout + 4 * pause(timeout))
    if dist.is_initialized():
        rank, size, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    else:
        rank, size = _number_from_environment("RANK"), _number_from_environment("WORLD_SIZE")
        store = _meet(rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        atexit.register(leave, store, rank, size)
        own = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=later)
    # Groups of their own for agreeing and for files: on the host whatever the gradients use.
    group, files = dist.new_group(backend="gloo", timeout=FOR_EVER), dist.new_group(backend="gloo", timeout=later)
    assert group is not None and files is not None, "this process is a member"
    store = dist.PrefixStore(OWN_KEYS, store)
    watch = Watch(store, rank, size, timeout)
    own_seed = int(np.random.SeedSequence().generate_state(1)[0]) >> 1  # 31 bits: in the range of every generator
    told: list[Any] = [None] * size
    dist.all_gather_object(told, (own_seed, timeout), group=files)
    for other, (_, seconds) in enumerate(told):
        if seconds != told[0][1]:
            raise ValueError(
                f"Expected {VARIABLE}={told[0][1]:g} in all processes, as in rank 0, got {seconds:g} in rank {other}."
            )
    watch.start()
    atexit.register(watch.stop)  # also in a group that the script has made; before `leave`, which was registered first
    return World(rank, size, told[0][0], store, group, files, watch)


def _meet(rank: int, size: int) -> dist.Store:
    """Return the store of all processes, once all have come with the same WORLD_SIZE."""
    if not 0 <= rank < size:
        raise ValueError(f"Expected RANK from 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}.")
    host, port = os.environ.get("MASTER_ADDR"), _number_from_environment("MASTER_PORT")
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
    store = _of_attempt(base)
    refusal = _refusal(store, rank, size)
    if refusal is not None:
        if serves:
            time.sleep(1.0)  # seconds for the others to read the reason: the store ends with this process
        raise refusal
    return store


def _of_attempt(store: dist.Store) -> dist.Store:
    """Return the keys of this attempt: the store of `torchrun` outlives a restart of the processes."""
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def store_of_attempt(store: dist.Store) -> dist.Store:
    """Return the part of a launcher's store that is `World.store` in the processes that it starts."""
    return dist.PrefixStore(OWN_KEYS, _of_attempt(store))


def _serves(rank: int) -> bool:
    """Return whether this process serves the store: rank 0 does, unless `torchrun` has a store for all restarts."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def leave(store: dist.Store, rank: int, size: int) -> None:
    """Announce the end of this process; the process that serves the store waits a while for those that still read."""
    deadline, all_left = time.monotonic() + LEAVE_SECONDS, [f"left {other}" for other in range(size)]
    with suppress(dist.DistError):  # the process that serves the store has ended already
        store.set(f"left {rank}", "1")
        while _serves(rank) and time.monotonic() < deadline and not store.check(all_left):
            time.sleep(POLL_SECONDS)


def _refusal(store: dist.Store, rank: int, size: int) -> Exception | None:
    """Wait until all processes have come; return the error if they do not fit together, else None."""
    deadline, missing = time.monotonic() + JOIN_SECONDS, list(range(size))
    try:
        first = int(store.compare_set("size", "", str(size)))
        if first != size:
            store.set("refused", f"rank {rank} has WORLD_SIZE={size}, but the first process to join has {first}")
        if store.add(f"rank {rank}", 1) > 1:
            store.set("refused", f"two processes have RANK={rank}")
        while missing and time.monotonic() < deadline:
            if store.check(["refused"]):
                reason = store.get("refused").decode()
                return ValueError(f"Expected {size} processes, with the same WORLD_SIZE and a RANK each, but {reason}.")
            missing = [other for other in range(size) if not store.check([f"rank {other}"])]
            time.sleep(POLL_SECONDS)
    except dist.DistError:  # rank 0, which serves the store, has given up first
        missing = missing or [0]
    if missing:
        return TimeoutError(f"Expected {size} processes within {JOIN_SECONDS:.0f} s, got none of rank {missing}.")
    return None
