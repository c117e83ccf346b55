"""The command in one of several processes: they do the same together, and speak with one voice."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from textenv import __version__

from ..distributed.collectives import gather
from ..distributed.failures import Failure, consequence, fail_first, said
from ..distributed.sharding import Sharded
from ..distributed.warned import warnings_noted, warnings_of_others
from ..distributed.world import World, joined, world
from ..errors import HANDLED, CommandError, CommonError, Exit
from ..runs.changed_keys import differences
from ..runs.exit_codes import as_command_error
from ..runs.folder import versions
from ..runs.plan import Plan
from ..signals import write_line

# The verbs that several processes can run together; of any other, why not, and what to do instead.
TOGETHER = ("train", "sft", "classifier", "reward-model", "evaluate", "generate")
APART = {"tune": "start the same command several times, and the processes share one search"}


def take_part(verb: str, read: Callable[[], tuple[Any, ...]], do: Callable[..., int]) -> int:
    """Run a verb in this process together with the others, and return the exit code.

    Rank 0 alone writes to standard output and standard error; a warning that only others give it says at the end, or
    `train` after the iteration.

    Args:
        verb: The verb.
        read: Parses the command's words, and returns the arguments of `do`.
        do: Does the work of the verb; all processes call it.

    Raises:
        CommandError: If the verb is for one process, if processes have other packages or settings, or if anything
            goes wrong in this process or in another one.
    """
    here = world()
    assert here is not None, "a launcher has announced several processes"
    if verb not in TOGETHER:
        cure = APART.get(verb, "start it without torchrun and accelerate launch, and without --processes")
        raise CommonError(f"Expected one process for textenv {verb}, got {here.size}: {cure}.")
    if verb != "train" and Sharded.asked_for() is not None:
        raise CommonError(f"Expected --use_fsdp for textenv train only, got it for {verb}: leave it out.")
    try:
        with nullcontext() if here.rank == 0 else _silence(), warnings_noted():
            code = do(*_agreed(here, read))
            others = warnings_of_others()
        for line in others if here.rank == 0 else ():
            write_line(f"warning: {line}")
        return code
    except (CommandError, *HANDLED) as error:
        if (lost := consequence(error)) is not None:
            raise lost from error
        raise
    except Exception as error:
        if (lost := consequence(error)) is not None:
            raise lost from error
        write_line(traceback.format_exc())
        raise as_command_error(error, Path.cwd()) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Within, discard what this process prints, also from loggers that hold the streams, and from C++."""
    numbers = 1, 2
    kept = [os.dup(number) for number in numbers]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in numbers:
            os.dup2(nowhere, number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, own in zip(numbers, kept, strict=True):
            os.dup2(own, number)
            os.close(own)
        os.close(nowhere)


def _agreed(here: World, read: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Parse the command's words, and check that all processes have the same packages and settings.

    Raises:
        CommandError: If a process cannot parse its words, or has others.
    """
    arguments: tuple[Any, ...] = ()
    refusal: CommandError | None = None
    try:
        arguments = read()
    except (CommandError, *HANDLED) as error:
        refusal = as_command_error(error, Path.cwd())
    packages = gather("the packages", {"textenv": __version__, **versions()})
    _check_same("the same packages", packages)
    refusals = gather("the arguments", None if refusal is None else (str(refusal), refusal.code))
    if refusal is not None and all(other == refusals[0] for other in refusals):
        raise CommonError(str(refusal), refusal.code)
    if refusal is not None:
        raise refusal
    for rank, other in enumerate(refusals):
        if other is not None:
            raise CommonError(f"rank {rank}: {other[0]}", other[1])
    if any(getattr(argument, "processes", None) is not None for argument in arguments):
        raise CommonError("Expected --processes or a launcher such as torchrun, got both: leave one of them out.")
    _check_same("the same settings", gather("the settings", _settings(arguments)))
    return arguments


def _check_same(what: str, of_ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise `CommandError` if a process differs from rank 0."""
    for rank, other in enumerate(of_ranks):
        for key, (first, second) in differences(dict(of_ranks[0]), dict(other)).items():
            raise CommonError(
                f"Expected {what} in all processes, got {key} {first!r} in rank 0 and {second!r} in rank {rank}: start "
                "all with the same command, files and environment."
            )


def _settings(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the configurations and options among a verb's arguments."""
    found: dict[str, Any] = {}
    for argument in arguments:
        plans = argument if isinstance(argument, list) else []
        configs = [plan.config for plan in plans if isinstance(plan, Plan)]
        for i, config in enumerate(configs):
            found |= {f"run {i + 1}": asdict(config)} if len(configs) > 1 else asdict(config)
        if is_dataclass(argument) and not isinstance(argument, type):
            found |= asdict(argument)
    return found


def end_of_one(line: str, code: int, is_common: bool = False) -> int:
    """Print the line with which a process ends, unless another has failed first; return the exit code of all.

    Args:
        line: What is wrong.
        code: The exit code.
        is_common: Whether all processes have the same line.
    """
    here = joined()
    rank = int(os.environ.get("RANK", "0")) if here is None else here.rank
    is_common = is_common or code >= Exit.SIGNAL
    first = fail_first(Failure(None if is_common else rank, line, code))
    if first is not None:
        return first.code
    write_line(f"textenv: {line if is_common else f'rank {rank}: {line}'}")
    said()
    return code
