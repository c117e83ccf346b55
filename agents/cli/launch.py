"""The launcher behind `--processes N`: it starts the command N times on this machine, as torchrun would."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import cast

import torch
import torch.distributed as dist

from ..distributed.failures import FAILURE, Failure, publish
from ..distributed.hangs import VARIABLE, check_seconds
from ..distributed.world import store_of_attempt
from ..errors import CommandError, Exit
from .ending import say

LOOPBACK = "127.0.0.1"
LOOPBACK_DEVICE = "lo0" if sys.platform == "darwin" else "lo"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # how long the others have to end once a process has failed, as in torchrun
STARTS = [sys.executable, "-m", "textenv_command"]  # which refuses another package of the name `agents`


def launch(words: Sequence[str]) -> int:
    """Run the command in the number of processes that --processes names; return the exit code of all.

    The processes have the environment of torchrun. Unlike torchrun, the launcher waits after Ctrl-C until they have
    saved their work, passes a second Ctrl-C on, and returns the exit code of the process that has failed first.

    Args:
        words: The words after `textenv`.

    Raises:
        CommandError: If the number is not one, or --timeout is no positive number.
    """
    n, rest = _number(words)
    _timeout(words)  # so that it is refused once, before any process starts
    if n == 1:
        environments: list[dict[str, str]] = [{}]
        return _Processes(rest, environments, None).wait()
    # A socket that listens already and on the loopback alone: no other program can take the port in between.
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        listening.listen()
        port = listening.getsockname()[1]
        store = dist.TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listening.fileno())
        )
        return _Processes(rest, [_environment(rank, n, port) for rank in range(n)], store).wait()


def set_timeout(words: Sequence[str]) -> None:
    """Set the timeout of this process's job to that of the option --timeout, before it meets the others.

    Args:
        words: The words of the command.

    Raises:
        CommandError: If it is not a positive number of seconds.
    """
    if (text := _timeout(words)) is not None:
        os.environ[VARIABLE] = text


def _timeout(words: Sequence[str]) -> str | None:
    """Return the seconds of --timeout, which are checked; None without it."""
    try:
        text, _ = _take(words, "--timeout")
    except argparse.ArgumentError:  # without a value: the verb's own parser says so
        return None
    if text is not None:
        try:
            check_seconds("--timeout", text)
        except ValueError as error:
            raise CommandError(str(error)) from error
    return text


def _number(words: Sequence[str]) -> tuple[int, list[str]]:
    """Return the number of processes, and the words without it."""
    try:
        text, rest = _take(words, "--processes")
    except argparse.ArgumentError as error:
        raise CommandError(f"Expected --processes N, the number of processes, got {error}.") from error
    if text is None or not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise CommandError(f"Expected --processes to be a number of 1 or more, got {text!r}.")
    return int(text), rest


def _take(words: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of an option, None without it, and the words without both.

    Raises:
        argparse.ArgumentError: If the option has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option, dest="value")
    found, rest = parser.parse_known_args(list(words))
    return cast("str | None", found.value), rest


def _environment(rank: int, n: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for a process on one machine, in addition to ours."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank}
    sizes = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "GROUP_WORLD_SIZE": 1, "ROLE_WORLD_SIZE": n}
    address = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    variables = {name: str(value) for name, value in {**ranks, **sizes, **address}.items()}
    if "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo would listen on the address of the machine's name
        variables["GLOO_SOCKET_IFNAME"] = LOOPBACK_DEVICE
    if n > 1 and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets 1; all processes together use all cores
        variables["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // n))
    return variables


class _Processes:
    """The processes of a job on this machine.

    Args:
        words: The words of the command.
        environments: By rank, the variables that each has in addition to ours.
        store: The store through which they meet; None for one process.
    """

    def __init__(self, words: Sequence[str], environments: Sequence[dict[str, str]], store: dist.Store | None) -> None:
        self.store = None if store is None else store_of_attempt(store)
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        self.handlers = {number: handler for number, handler in before.items() if handler is not None}
        self.is_named = False  # whether a process that was killed has been named
        self.asked = 0  # the last signal that was passed on
        # Sessions of their own: a terminal sends Ctrl-C to all processes of its session, and we pass it on, once.
        self.processes = [
            subprocess.Popen([*STARTS, *words], env={**os.environ, **variables}, start_new_session=True)
            for variables in environments
        ]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._send(number)

    def _send(self, number: int) -> None:
        for process in getattr(self, "processes", []):
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def wait(self) -> int:
        """Wait until all have ended; once one has failed, the others are asked to end, and then made to."""
        try:
            while (codes := [process.poll() for process in self.processes]) and None in codes:
                if any(codes):  # one has failed: neither None nor 0
                    self._end_others(codes)
                time.sleep(POLL_SECONDS)
            return self._result(codes)
        finally:
            self._send(signal.SIGKILL)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def _end_others(self, codes: Sequence[int | None]) -> None:
        self._name_killed(codes)
        deadline = time.monotonic() + GRACE_SECONDS
        if not self.asked:  # after Ctrl-C they end by themselves, at the same time
            self._send(signal.SIGTERM)
        while None in [process.poll() for process in self.processes]:
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _name_killed(self, codes: Sequence[int | None]) -> None:
        """Name a process that a signal has killed, which could not say so itself, before the others miss it."""
        for rank, code in enumerate(codes):
            if self.store is None or self.is_named or code is None or code >= 0:
                continue
            self.is_named = True
            name = signal.Signals(-code).name
            line = f"rank {rank} of {len(codes)} processes was ended by {name}; the last checkpoint is as it was"
            failure = Failure(rank, line, Exit.SIGNAL - code)
            if publish(self.store, failure) == failure:
                say(line)
                self.store.set("failure said", "1")
            return

    def _result(self, codes: Sequence[int | None]) -> int:
        """Return the exit code of all: that of the first failure."""
        self._name_killed(codes)
        if self.store is not None and any(codes) and self.store.check([FAILURE]):
            return publish(self.store, Failure(None, "", 0)).code
        failed = [code for code in codes if code]
        return Exit.DONE if not failed else failed[0] if failed[0] > 0 else Exit.SIGNAL - failed[0]
