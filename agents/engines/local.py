"""A rollout engine in a second process of this machine, which decodes in the same way as the policy."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.collectives import from_main, gather, once
from ..distributed.world import world
from ..models.pretrained import LMLike, as_spec
from ..policies.actor_critic import AUTOCAST_DTYPES
from .process import Setup, client_store, pack, serve, unpack
from .protocol import Completion, EngineLost, Request
from .wire import LOOPBACK, Background, Wire

END_SECONDS = 5.0  # how long the process may take to end by itself before it is killed


class LocalEngine:
    """A rollout engine for `EngineRollouts` in a process of its own, with a copy of the language model.

    The constructor starts the process on the same machine. The process builds the model from `lm` and takes the
    weights that it is sent. It decodes as the policy does, with cached keys and values; when a text ends, its row takes
    the next one. Trainer and engine exchange tensors over torch.distributed (gloo, on the loopback address, through the
    host's memory), in a process group of their own, without pickles.

    The process ends with the trainer's process, however that ends, by `close()`, and at the end of a `with`. If it
    dies, the next call raises within seconds. It is started by `spawn`, so a script that makes a `LocalEngine` must run
    under `if __name__ == "__main__":`.

    In several processes (`torchrun`) each has an engine of its own, which is sent the weights and writes the texts of
    that process's lanes. With `shared`, one engine serves all: rank 0 starts it and sends it the weights, once per
    update, while the others wait; each sends its own requests, which the engine answers one after the other. All
    processes must then make the `LocalEngine`, and close it: rank 0 ends the process when all have.

    Args:
        lm: The policy's language model: a name or path, a config or a spec.
        vocab_size: The number of tokens of the tokenizer; the model's other tokens are never sampled.
        autocast: "bfloat16" or "float16" to compute in 16 bits, whatever the policy's precision.
        device: The device of the copy: "cpu", "cuda:1", ...; "cuda" is the current one of the process that starts it.
        n_rows: The most texts that are written side by side.
        patience: The longest time, in seconds, for building the model and for each answer.
        shared: Whether all processes of the job share one engine; they must run on one machine.

    Raises:
        ValueError: If an argument is out of range, or the process cannot build the model, with the reason.
        EngineLost: If the process ends before it is ready.
        ProcessLost: With `shared`, in the other processes, if rank 0 cannot start it.

    Example:
        >>> from agents import EngineRollouts, LocalEngine
        >>> # with LocalEngine("gpt2", vocab_size=len(tokenizer), autocast="bfloat16") as engine:
        >>> #     model.learn(100_000, callback=EngineRollouts(engine))
    """

    def __init__(
        self,
        lm: LMLike,
        vocab_size: int,
        autocast: str | None = None,
        device: str = "cpu",
        n_rows: int = 64,
        patience: float = 1800.0,
        shared: bool = False,
    ) -> None:
        if autocast is not None and autocast not in AUTOCAST_DTYPES:
            raise ValueError(f"Expected `autocast` to be one of {[None, *AUTOCAST_DTYPES]}, got {autocast!r}.")
        for name, value in (("vocab_size", vocab_size), ("n_rows", n_rows), ("patience", patience)):
            if not value > 0:
                raise ValueError(f"Expected `{name}` to be positive, got {value}.")
        here = world() if shared else None
        rank, self._n_clients = (0, 1) if here is None else (here.rank, here.size)
        self._patience = timedelta(seconds=patience)
        self._process: SpawnProcess | None = None  # in the process that has started it
        self._wire: Wire | None = None
        self._talk: Background[tuple[dict[str, Any], list[Tensor]]] | None = None  # the last question and its answer
        _engines.add(self)
        try:
            setup = Setup(0, as_spec(lm), vocab_size, autocast, _current(device), n_rows, self._n_clients)
            port = self._start(setup) if here is None else self._start_shared(setup)
            self._wire = Wire(client_store(port, rank, self._patience), rank=0, patience=self._patience)
        except BaseException:
            self._end()
            raise

    def _start_shared(self, setup: Setup) -> int:
        """Start the process of all in rank 0, and return the port of its store; all processes must call it."""
        hosts = gather("the host", socket.gethostname())
        if len(set(hosts)) > 1:
            raise ValueError(
                f"Expected all processes on one machine with a shared LocalEngine, got {sorted(set(hosts))}: leave "
                "`shared` out, and each process has an engine of its own."
            )
        ports: list[int] = []
        once(lambda: ports.append(self._start(setup)))
        return from_main("the engine's port", ports)[0]

    def _start(self, setup: Setup) -> int:
        """Start the process, wait until it has built its model, and return the port of its store."""
        listening = socket.create_server((LOOPBACK, 0))  # a free port, which nobody can take before the store has it
        self._store = dist.TCPStore(
            LOOPBACK,
            listening.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=self._patience,
            master_listen_fd=listening.detach(),
        )
        setup = setup._replace(port=self._store.port)
        # A daemon: `multiprocessing` terminates it when the interpreter ends.
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(setup,), daemon=True)
        with _outside_the_job():
            self._process.start()
        self._meet(self._process)
        return setup.port

    def _meet(self, process: SpawnProcess) -> None:
        """Wait until the process has built its model; raise the reason if it cannot."""
        deadline, store = time.monotonic() + self._patience.total_seconds(), self._store
        while not store.check(["ready"]):
            if store.check(["refused"]):
                raise ValueError(f"Expected a model that the engine can build, got {store.get('refused').decode()}")
            if not process.is_alive():
                raise EngineLost(
                    f"Expected the engine's process to be ready, got {self._state()}. Where a script starts it, "
                    'put what the script runs under `if __name__ == "__main__":`.'
                )
            if time.monotonic() > deadline:
                raise EngineLost(f"Expected a model within {self._patience}, got none: raise `patience`.")
            time.sleep(0.05)  # seconds: short compared with the start of a process

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights; see `RolloutEngine`. All processes that share an engine must call it, and rank 0 sends.

        Raises:
            ValueError: If their names or shapes are not those of the engine's model.
            EngineLost: If the process has ended.
            ProcessLost: If rank 0 could not send them to the engine that all share.
        """

        def load() -> None:
            names, tensors = zip(*weights, strict=True)
            self._send({"do": "load", "names": names}, tensors)()

        if self._n_clients > 1:
            once(load)
        else:
            load()

    def generate(self, requests: Sequence[Request], temperature: float, seed: int) -> list[Completion]:
        """Continue texts; see `RolloutEngine`.

        Raises:
            ValueError: If a text would be longer than the model can read.
            EngineLost: If the process has ended, or gave no answer in time.
        """
        return self.start(requests, temperature, seed)()

    def start(self, requests: Sequence[Request], temperature: float, seed: int) -> Callable[[], list[Completion]]:
        """Begin to continue texts, and return at once; see `BackgroundEngine`.

        Raises:
            EngineLost: If the engine was closed.
        """
        tokens, most_new, stop_ids = zip(*requests, strict=True)
        tensors = [*pack(tokens), torch.tensor(most_new), *pack(stop_ids)]
        answer = self._send({"do": "write", "temperature": temperature, "seed": seed}, tensors)

        def completions() -> list[Completion]:
            written, counts, log_probs = answer()
            return [Completion(*pair) for pair in zip(unpack(written, counts), unpack(log_probs, counts), strict=True)]

        return completions

    def _send(self, header: dict[str, Any], tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Send a message in the background, and return a function that waits for the tensors of the answer."""
        if self._wire is None:
            raise EngineLost("Expected an engine that runs, got one that was closed: make a new one.")
        self._talk = current = Background(partial(self._exchange, self._wire, self._talk, header, tensors))

        def results() -> list[Tensor]:
            answer, received = self._or_close(current.result)
            if "error" in answer:
                raise ValueError(f"Expected the engine to {header['do']}, got {answer['error']}")
            return received

        return results

    def _exchange(
        self, wire: Wire, earlier: Background[Any] | None, header: dict[str, Any], tensors: Sequence[Tensor]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Send a message, and return the answer; a method, so that the thread keeps the engine alive until then."""
        if earlier is not None:  # the wire carries one question and its answer at a time
            earlier.thread.join()
        wire.send(header, tensors)
        return wire.receive()

    def _or_close(self, talk: Callable[[], Any]) -> Any:
        """Return the answer; on any error end the process, since half a message may still be in transit."""
        try:
            return talk()
        except RuntimeError as error:  # from gloo: the connection is closed, or no answer came in time
            if self._process is not None:
                self._process.join(1.0)
            state = self._state()
            self._end()
            raise EngineLost(f"Expected an answer of the engine's process, got {state} ({error}).") from error
        except BaseException:
            self._end()
            raise

    def _state(self) -> str:
        """Return the state of the process in words, for an error."""
        if self._process is None:
            return "none: the engine that rank 0 has started for all has ended, or was too slow"
        code = self._process.exitcode
        if code is None:
            return "none in time, though it runs"
        return f"its end, by signal {-code}" if code < 0 else f"its end, with exit code {code}"

    def close(self) -> None:
        """End the process; a second call does nothing.

        An engine that several processes share ends when all of them have closed it, for which rank 0 waits.
        """
        self._leave()
        if self._process is not None and self._n_clients > 1:
            self._process.join(self._patience.total_seconds())
        self._end()

    def _leave(self) -> None:
        """Close the connection, by which the engine knows that this process needs no more texts."""
        wire, self._wire = self._wire, None
        if wire is not None and self._n_clients > 1:
            wire.group.abort()

    def _end(self) -> None:
        """End the process at once, if this process has started it."""
        self._leave()
        if self._process is not None:
            self._process.terminate()  # SIGTERM, as at the end of the interpreter
            self._process.join(END_SECONDS)
            self._process.kill()  # nothing is lost: the process writes no files
            self._process.join()
        if self._talk is not None:
            self._talk.thread.join(END_SECONDS)  # gloo raises in it, now that the connection is closed

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end()  # the other processes may wait for this one


_engines: weakref.WeakSet[LocalEngine] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """End the engines that still write, and the threads that wait for their answers, before the interpreter ends.

    Below Python 3.14 a thread that comes back from C++ while the interpreter ends is unwound through C++, which aborts
    the process ("terminate called without an active exception").
    """
    for engine in list(_engines):
        if engine._talk is not None and engine._talk.thread.is_alive():
            engine._end()


def _current(device: str) -> str:
    """Return "cuda" with the index of this process's current device: that of the engine's process would be 0."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and torch.cuda.is_available() else device


@contextmanager
def _outside_the_job() -> Iterator[None]:
    """Take away the launcher's variable by which a process that starts here would join the job under this rank."""
    size = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if size is not None:
            os.environ["WORLD_SIZE"] = size
