"""The process of a `LocalEngine`: it holds a model, takes weights and continues texts, for one trainer or several."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection, parent_process
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from textenv.episodes.rules import PADDING, SEPARATOR

from ..models.backbone import Backbone
from ..models.pretrained import LMLike, build_model
from ..models.probe import PROBE_LENGTH
from ..models.sampling import Sampling
from ..policies.actor_critic import LMActorCritic
from .protocol import Completion, Request, unique
from .wire import LOOPBACK, Wire

MEET = timedelta(minutes=5)  # the longest wait for the trainer's store, which exists before the process starts
FOREVER = timedelta(days=365)  # the longest wait for a request: an evaluation between two rollouts may take any time


class Setup(NamedTuple):
    """The arguments of the process; all but the port are those of `LocalEngine`.

    Attributes:
        port: The port of the trainer's store, on the loopback address.
        n_clients: The number of processes that send messages.
    """

    port: int
    lm: LMLike
    vocab_size: int
    autocast: str | None
    device: str
    n_rows: int
    n_clients: int = 1


def serve(setup: Setup) -> None:
    """Build the model, and answer the trainers until all have left, or one of them terminates this process.

    SIGTERM ends the process by `sys.exit`, so that libraries clean up: after a kill, Python would report tqdm's
    semaphore as leaked, for instance. What follows in Python's own end is left out: `_listen` waits in C++, and below
    Python 3.14 a thread that comes back from there while the interpreter ends aborts the process.
    """
    atexit.register(os._exit, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to both processes; the trainer handles it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _answer_all(setup)
    except Exception:
        atexit.register(os._exit, 1)  # the last function to be registered is the first to run
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process is ending already


def _answer_all(setup: Setup) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = dist.TCPStore(LOOPBACK, setup.port, is_master=False, timeout=MEET)
    try:
        writer = Writer(setup)
    except Exception as error:
        store.set("refused", f"{type(error).__name__}: {error}")
        return
    store.set("ready", "1")
    messages: SimpleQueue[Message | None] = SimpleQueue()
    for client in range(setup.n_clients):
        threading.Thread(target=_listen, args=(setup.port, client, messages), daemon=True).start()
    n_clients = setup.n_clients
    while n_clients:
        message = messages.get()  # one at a time: the model has one set of weights
        if message is None:
            n_clients -= 1
            continue
        try:
            header, answer = {}, writer.answer(message.header, message.tensors)
        except Exception as error:
            header, answer = {"error": f"{type(error).__name__}: {error}"}, []
        with suppress(RuntimeError):  # the client has ended, which `_listen` reports
            message.wire.send(header, answer)


class Message(NamedTuple):
    """What a client asks for, and the connection on which it waits for the answer."""

    wire: Wire
    header: dict[str, Any]
    tensors: list[Tensor]


def _listen(port: int, client: int, messages: SimpleQueue[Message | None]) -> None:
    """Put the messages of a client into the queue, and None when it has left."""
    with suppress(RuntimeError):  # gloo's, when the client has closed the connection or ended
        wire = Wire(client_store(port, client, MEET), rank=1, patience=FOREVER)
        while True:
            messages.put(Message(wire, *wire.receive()))
    messages.put(None)


def client_store(port: int, client: int, patience: timedelta) -> dist.Store:
    """Return the part of the trainer's store through which a client and the engine find each other.

    It has a connection of its own to the store, since a wait for one client would keep others from using it.
    """
    store = dist.TCPStore(LOOPBACK, port, is_master=False, timeout=patience)
    return dist.PrefixStore(f"client {client}", store)


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, and then end it, too."""
    parent = parent_process()
    assert parent is not None, "started by a LocalEngine"
    connection.wait([parent.sentinel])
    os._exit(0)  # not `sys.exit`: the main thread may wait in C++, where no exception reaches it


class Writer:
    """A language model without a critic, which answers the messages of the trainer.

    Raises:
        ValueError: If the model is an encoder-decoder.
    """

    def __init__(self, setup: Setup) -> None:
        model = build_model(setup.lm, train=None)
        if model.config.is_encoder_decoder:
            raise ValueError(f"Expected a causal language model, got {type(model).__name__}.")
        backbone = Backbone(model, setup.vocab_size, PROBE_LENGTH)  # the lengths of requests are checked in `write`
        self.lm = LMActorCritic(backbone, nn.Identity(), autocast=setup.autocast).to(setup.device).eval()
        self.weights = dict(unique(model.state_dict()))
        self.n_rows = setup.n_rows

    def answer(self, header: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
        """Carry out a message ("load" or "write"), and return the tensors of the answer."""
        if header["do"] == "load":
            self.load(dict(zip(header["names"], tensors, strict=True)))
            return []
        requests = [
            Request(tokens, int(most_new), tuple(stops.tolist()))
            for tokens, most_new, stops in zip(unpack(*tensors[:2]), tensors[2], unpack(*tensors[3:]), strict=True)
        ]
        written = write(self.lm, requests, header["temperature"], header["seed"], self.n_rows)
        log_probs = np.concatenate([completion.log_probs for completion in written])
        return [*pack([completion.tokens for completion in written]), torch.as_tensor(log_probs)]

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the model.

        Raises:
            ValueError: If their names or shapes differ from those of the model.
        """
        differing = sorted(weights.keys() ^ self.weights.keys())
        common = weights.keys() & self.weights.keys()
        differing += sorted(name for name in common if weights[name].shape != self.weights[name].shape)
        if differing:
            raise ValueError(
                f"Expected the weights of the engine's model, got those of another: {differing[:5]} differ."
            )
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        self.lm.drop_caches()


@torch.no_grad()
def write(
    lm: LMActorCritic, requests: Sequence[Request], temperature: float, seed: int, n_rows: int
) -> list[Completion]:
    """Continue texts, at most `n_rows` side by side; a row whose text ends takes the next text.

    Args:
        lm: The model; its sampling is set, and its caches are dropped afterwards.
        requests: The texts.
        temperature: The number that divides the logits.
        seed: The seed of the sampling.
        n_rows: The most texts that are written side by side.

    Returns:
        A completion for each request, in their order.

    Raises:
        ValueError: If a text would be longer than the model can read.
    """
    lm.backbone.check_length(max(len(request.tokens) + request.most_new for request in requests))
    lm.sampling = Sampling(temperature)
    generator = torch.Generator().manual_seed(seed)
    n_rows, waiting = min(n_rows, len(requests)), deque(range(len(requests)))
    width = 1 + max(len(request.tokens) + request.most_new for request in requests)  # 1 for the separator
    rows = np.full((n_rows, width), PADDING, dtype=np.int64)  # observations: prompt, separator, completion, padding
    request_of = np.full(n_rows, -1)  # by row, the index of its request; -1: the row is free
    written: list[list[tuple[int, float]]] = [[] for _ in requests]  # tokens and log-probabilities
    while True:
        for row in np.flatnonzero(request_of < 0).tolist():
            rows[row] = PADDING
            rows[row, 0] = SEPARATOR  # a free row is an empty prompt, which is read like the others and then ignored
            if waiting:
                request_of[row] = waiting.popleft()
                tokens = requests[request_of[row]].tokens
                rows[row, : len(tokens)], rows[row, len(tokens)] = tokens, SEPARATOR
        if (request_of < 0).all():
            break
        step = lm.act(torch.as_tensor(rows, device=lm.backbone.device), False, generator, lm.rollout_cache)
        chosen = zip(request_of.tolist(), step.actions.tolist(), step.log_probs.tolist(), strict=True)
        for row, (number, token, log_prob) in enumerate(chosen):
            if number < 0:
                continue
            written[number].append((token, log_prob))
            request, n = requests[number], len(written[number])
            if token in request.stop_ids or n == request.most_new:
                request_of[row] = -1
            else:
                rows[row, len(request.tokens) + n] = token
    lm.drop_caches()
    return [
        Completion(np.array([token for token, _ in pairs]), np.array([p for _, p in pairs], dtype=np.float32))
        for pairs in written
    ]


def pack(arrays: Sequence[np.ndarray | tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Return the whole numbers of several arrays as one tensor (N,), and the length of each array."""
    flat = np.concatenate([np.asarray(array, dtype=np.int64) for array in arrays])
    return torch.as_tensor(flat), torch.tensor([len(array) for array in arrays])


def unpack(flat: Tensor, counts: Tensor) -> list[np.ndarray]:
    """Return the arrays that `pack` joined."""
    return np.split(flat.numpy(), np.cumsum(counts.numpy())[:-1])
