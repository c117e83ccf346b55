"""The end of a verb by an error: one line and an exit code, also where several processes run it together."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import CommandError, CommonError, Exit, StageStopped

SEVERAL = "WORLD_SIZE"  # the environment variable by which launchers announce several processes


def is_one_of_several() -> bool:
    """Return whether a launcher has started this process as one of several. This does not load torch."""
    return os.environ.get(SEVERAL, "1") != "1"


def asks_for_processes(words: Sequence[str]) -> bool:
    """Return whether the words of the command ask to start several processes, which `launch` does."""
    return not is_one_of_several() and any(word.partition("=")[0] == "--processes" for word in words)


def refuse(error: CommandError) -> int:
    """Print the line of an error, and return its exit code."""
    from textenv.text.printable import printable  # which loads gymnasium

    return end(printable(str(error)), error.code, isinstance(error, CommonError))


def end_by_error(error: Exception) -> int:
    """Print what one of the `HANDLED` errors says in a line, and return the exit code."""
    from ..runs.exit_codes import as_command_error

    if isinstance(error, BrokenPipeError):  # `textenv ... | head`: the reader has closed the pipe
        # Python flushes standard output when it ends, which would raise again: /dev/null takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.DONE
    return refuse(as_command_error(error, Path.cwd()))


def end_by_interrupt(interrupt: KeyboardInterrupt, verb: str, stages: tuple[str, ...]) -> int:
    """Say after Ctrl-C how to continue, and return the exit code.

    Args:
        interrupt: The interrupt: a `StageStopped` has `args`, its message; Python's own has none.
        verb: The verb.
        stages: The verbs that keep states.
    """
    line = f"interrupted{_what_is_saved(verb, stages, bool(interrupt.args))}"
    return end(line, interrupt.code if isinstance(interrupt, StageStopped) else Exit.SIGNAL + 2)  # SIGINT is signal 2


def _what_is_saved(verb: str, stages: tuple[str, ...], has_state: bool) -> str:
    """Return how to continue after Ctrl-C: it depends on the verb, and on whether a stage has just saved its state."""
    if has_state:
        return ": the same command with --resume continues"
    if verb == "train":
        return ": nothing was saved yet, the same command starts again"
    return ": the same command starts again, with --resume from what was saved last" if verb in stages else ""


def end(line: str, code: int, is_common: bool = False) -> int:
    """Print the last line of a verb, and return the exit code; of several processes, the first that fails prints.

    Args:
        line: The line.
        code: The exit code.
        is_common: Whether the line is the same in all processes, and names none.
    """
    if is_one_of_several():
        from .processes import end_of_one  # which loads torch

        return end_of_one(line, code, is_common)
    say(line)
    return code


def say(line: str) -> None:
    """Print a line of the command itself on standard error."""
    with suppress(OSError):  # the terminal may be closed; the exit code remains
        print(f"textenv: {line}", file=sys.stderr, flush=True)
