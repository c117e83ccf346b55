"""The first failure in a job of several processes: who reports it, and what the other processes make of it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from ..errors import CommandError, Exit
from .collectives import ANSWER_SECONDS, silent_ranks
from .hangs import ProcessLost
from .world import joined

FAILURE, SAID = "failure", "failure said"
# What gloo's and NCCL's errors say when another process is gone; torch raises them as plain RuntimeErrors.
LOST = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Failure(NamedTuple):
    """The failure of a process.

    Attributes:
        rank: The rank of the process; None for a failure that all have in common.
        line: The line that says what is wrong.
        code: The exit code of the command.
    """

    rank: int | None
    line: str
    code: int


def publish(store: dist.Store, failure: Failure) -> Failure:
    """Leave a failure in the store of a job unless there is one; return the first failure that was left there."""
    return Failure(*json.loads(store.compare_set(FAILURE, "", json.dumps(failure))))


def first_failure() -> Failure | None:
    """Return the first failure of any process of this job; None if there is none, or its store is gone."""
    here = joined()
    with suppress(dist.DistError):
        if here is not None and here.store.check([FAILURE]):
            return Failure(*json.loads(here.store.get(FAILURE)))
    return None


def fail_first(failure: Failure) -> Failure | None:
    """Claim to be the first process that fails.

    Returns:
        None if this process is the first, and is to print the failure and then call `said`; else the first failure,
        once its process has printed it.
    """
    here = joined()
    if here is None:  # this process has not met the others: nobody else knows of its failure
        return None
    try:
        first = publish(here.store, failure)
        if first == failure and here.store.add(f"{FAILURE} claimed", 1) == 1:
            return None
        here.store.wait([SAID], timedelta(seconds=ANSWER_SECONDS))
    except dist.DistError:  # the store is gone, with the process that served it, or nobody has said anything
        return None if first_failure() is None else first
    return first


def said() -> None:
    """Note that the first failure is printed, so that the other processes may end."""
    here = joined()
    if here is not None:
        with suppress(dist.DistError):
            here.store.set(SAID, "1")


def consequence(error: BaseException) -> CommandError | None:
    """Return what an error of this process says of another process that has failed; None for an error of its own.

    The failing process has left its line in the store before it ended. One that was killed has not: it is named after a
    few seconds in which it does not answer.
    """
    if not is_loss(error):
        return None
    deadline = time.monotonic() + ANSWER_SECONDS
    while (first := first_failure()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if first is not None:
        return CommandError(first.line, first.code)
    here = joined()
    lost = (
        str(error) if isinstance(error, ProcessLost) or here is None else f"no answer of {silent_ranks(here)}: {error}"
    )
    return CommandError(lost.partition("\n")[0], Exit.FAILED)


def is_loss(error: BaseException) -> bool:
    """Return whether an error comes from the loss of another process."""
    if isinstance(error, (ProcessLost, dist.DistError)):
        return True
    return joined() is not None and type(error) is RuntimeError and any(word in str(error) for word in LOST)


def stop_if_another_failed() -> None:
    """Raise `ProcessLost` if another process has failed: a launcher ends the others by a signal, whose handler asks.

    Raises:
        ProcessLost: If it has.
    """
    first, here = first_failure(), joined()
    if first is not None and here is not None and first.rank != here.rank:
        raise ProcessLost(first.line)
