"""The watch over the processes of a job, which names the one that hangs, where it hangs, and who waits for it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import dropwhile, islice
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

from textenv.episodes.waiting import waits_for_people

VARIABLE = "TEXTENV_TIMEOUT"
TIMEOUT = 1800.0  # seconds: torch.distributed's own default
LOOKS = 8  # how often a process looks at the others within a timeout
LONGEST_PAUSE = 5.0  # seconds between two looks where the timeout is long
N_FRAMES = 3  # the innermost calls that a place names
HERE = str(Path(__file__).parent)
COLLECTIVES = str(Path(dist.__file__).parent)  # a thread that is in a file of this folder waits for other processes
BACKWARD = "_engine_run_backward"  # in it, `DistributedDataParallel` waits for the others, without a frame of its own

_last_progress = time.monotonic()


class ProcessLost(RuntimeError):
    """The error of a process when another process of the job has ended, hangs or does not answer."""


def note_progress() -> None:
    """Note that this process has made progress: sampled tokens, evaluated a minibatch, met the others."""
    global _last_progress
    _last_progress = time.monotonic()


def timeout_from_environment() -> float:
    """Return the seconds of `TEXTENV_TIMEOUT`, 1800 by default.

    Raises:
        ValueError: If it is not a positive number.
    """
    return check_seconds(VARIABLE, os.environ.get(VARIABLE, str(TIMEOUT)))


def check_seconds(name: str, text: str) -> float:
    """Return the seconds that a text says.

    Args:
        name: The variable or option that holds the text.
        text: The text.

    Raises:
        ValueError: If it is not a positive number.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"Expected {name} to be a positive number of seconds, got {text!r}.")
    return seconds


def pause(timeout: float) -> float:
    """Return the seconds between two looks at the others."""
    return min(timeout / LOOKS, LONGEST_PAUSE)


class State(NamedTuple):
    """What a process tells the others about itself.

    Attributes:
        beat: The number of times that it has told it; if this stays the same, its interpreter hangs or was stopped.
        idle: The seconds since its last progress; 0 while it waits for people.
        waits: What it waits for together with the other processes; None if it is at work of its own.
        waited: The seconds of this wait so far.
        place: The innermost calls of the thread that trains.
    """

    beat: int
    idle: float
    waits: str | None
    waited: float
    place: str


def verdict(states: Mapping[int, State], silence: Mapping[int, float], timeout: float) -> tuple[list[int], str] | None:
    """Return the ranks that hang, and a message that names them; None if none does or nobody waits.

    A process hangs if another has waited for `timeout` seconds, while it did not answer or made no progress for as long
    and did not wait for others. If all wait and nothing has moved for as long, all hang, each at the wait of another.

    Args:
        states: What each process has told last, by rank.
        silence: The seconds since `State.beat` of each process has changed.
        timeout: The seconds after which a process without progress hangs.

    Example:
        >>> states = {0: State(9, 3.2, "the log", 3.1, ""), 1: State(9, 3.5, None, 0.0, "train.py:7 in reward")}
        >>> ranks, message = verdict(states, {0: 0.1, 1: 0.1}, timeout=3)
        >>> ranks, message[:79]
        ([1], 'Expected progress of each of 2 processes within 3 s, got none of rank 1 for 4 s')
    """
    waiting = {rank: state.waits for rank, state in states.items() if state.waits is not None}
    silent = [rank for rank in states if silence[rank] >= timeout]
    stuck = [rank for rank, state in states.items() if state.idle >= timeout and rank not in silent]
    hanging = sorted(silent + [rank for rank in stuck if rank not in waiting])
    if not hanging and len(stuck) == len(states):
        hanging = stuck
    waiters = {rank: what for rank, what in waiting.items() if rank not in hanging or hanging == stuck}
    # Who has just come waits for one that may have been slow before: to build a model is no progress, either.
    if not hanging or not any(states[rank].waited >= timeout for rank in waiters):
        return None
    parts = []
    for rank in hanging:
        state = states[rank]
        if rank in silent:
            parts.append(f"no answer of rank {rank} for {silence[rank]:.0f} s, last seen at {state.place}")
        else:
            parts.append(f"none of rank {rank} for {state.idle:.0f} s, which is at {state.place}")
    waits = "; ".join(f"rank {rank} waits for it at {what!r}" for rank, what in waiters.items())
    return hanging, (
        f"Expected progress of each of {len(states)} processes within {timeout:g} s, got {' and '.join(parts)}; "
        f"{waits}. If this may take longer, set {VARIABLE} to more seconds; a reward that waits for people says so by "
        "`textenv.rewards.waiting_for_people()`."
    )


class Watch:
    """A thread that tells the other processes what this one does, and looks at them while this one waits.

    Where the process waits in a function of `collectives`, `check` raises the message. Where it waits in a collective
    of torch's own (of gradients, of shards), the message is printed, and torch's own timeout ends the wait soon after.

    Args:
        store: The store of the job; the thread opens a connection of its own, since a store serves one call at a time.
        rank: The rank of this process.
        size: The number of processes.
        timeout: The seconds after which a process without progress hangs: the same in all processes.

    Attributes:
        waited: The seconds that this process has waited for others since `take_waited`.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.waited = 0.0
        self._store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._watched = threading.get_ident()
        self._waits: str | None = None
        self._waits_since = 0.0
        self._message: str | None = None
        self._beat = 0
        self._beats: dict[int, tuple[int, float]] = {}  # by rank, the last beat and when it was first seen
        self._frames: tuple[tuple[int, int], ...] = ()
        self._frames_since = time.monotonic()
        self._stopped = threading.Event()
        note_progress()  # the time since this module was imported says nothing
        self._tell()

    def start(self) -> None:
        """Start the thread; all processes must have made their watch."""
        note_progress()
        self._thread = threading.Thread(target=self._run, name="watch over the processes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread: this process leaves the others."""
        self._stopped.set()
        self._thread.join(1.0)
        with suppress(RuntimeError):  # the store is gone
            self._store.set(f"state {self.rank}", json.dumps(State(-1, 0.0, None, 0.0, "its end")))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Return a context in which this process waits for others, at something with a name."""
        self._waits_since = time.monotonic()
        self._waits = what
        try:
            yield
        finally:
            self._waits = None
            self.waited += time.monotonic() - self._waits_since
            note_progress()

    def check(self) -> None:
        """Raise an error if a process hangs.

        Raises:
            ProcessLost: With the rank that hangs, where it hangs, and who waits for it.
        """
        if self._message is not None:
            raise ProcessLost(self._message)

    def take_waited(self) -> float:
        """Return the seconds that this process has waited for others since the last call."""
        seconds, self.waited = self.waited, 0.0
        return seconds

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it rank 0: whoever waits is told by gloo
            while not self._stopped.wait(pause(self.timeout)):
                state = self._tell()
                if self._message is None and (self._waits is not None or self._is_blocked()):
                    self._look(state)

    def _tell(self) -> State:
        """Leave the state of this process in the store, and return it."""
        if waits_for_people():
            note_progress()
        running = sys._current_frames()
        # The thread that joined the others, or, if that has ended, the main thread.
        frames = _frames(running.get(self._watched) or running.get(threading.main_thread().ident or 0))
        fingerprint = tuple((id(frame), frame.f_lasti) for frame in frames)
        if fingerprint != self._frames:
            self._frames, self._frames_since = fingerprint, time.monotonic()
        self._beat += 1
        now, waits = time.monotonic(), self._waits
        since = self._frames_since if waits is None else self._waits_since
        waits = waits or _collective(frames)
        waited = 0.0 if waits is None else now - since
        state = State(self._beat, now - _last_progress, waits, waited, _place(frames))
        self._store.set(f"state {self.rank}", json.dumps(state))
        return state

    def _is_blocked(self) -> bool:
        """Return whether the thread that trains has been inside one and the same call for the whole timeout."""
        return time.monotonic() - self._frames_since >= self.timeout

    def _look(self, own: State) -> None:
        states = {rank: State(*json.loads(self._store.get(f"state {rank}"))) for rank in range(self.size)}
        now = time.monotonic()
        states[self.rank] = own
        for rank, state in states.items():
            if self._beats.get(rank, (-1, 0.0))[0] != state.beat:
                self._beats[rank] = (state.beat, now)
        silence = {rank: now - seen for rank, (_, seen) in self._beats.items()}
        result = verdict(states, silence, self.timeout)
        if result is not None and (self.rank not in result[0] or own.waits is not None):
            self._message = result[1]
            if self._waits is None:
                with suppress(OSError, ValueError):  # a terminal that is gone, a closed stream
                    print(self._message, file=sys.stderr, flush=True)


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Return a thread's frames, the innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _collective(frames: list[FrameType]) -> str | None:
    """Return what a thread waits for if it is inside a collective of torch; None if it is not."""
    if not frames:
        return None
    code = frames[0].f_code
    if code.co_filename.startswith(COLLECTIVES):
        return f"torch.distributed, {code.co_name}"
    return "the backward pass" if code.co_name == BACKWARD else None


def _place(frames: list[FrameType]) -> str:
    """Return the innermost calls of a thread as words."""
    outside = dropwhile(lambda frame: frame.f_code.co_filename.startswith(HERE), frames)
    return ", called from ".join(map(_call, islice(outside, N_FRAMES)))


def _call(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    with suppress(OSError, ValueError):  # a current folder that is gone, a file outside it
        path = path.relative_to(Path.cwd())
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
