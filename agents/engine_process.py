"""What runs in the process of a `LocalEngine`: it holds a model, takes weights, and continues texts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import connection, parent_process
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from textenv.episode import PADDING, SEPARATOR

from .actor_critic import LMActorCritic
from .backbone import PROBE_LENGTH, Backbone
from .engine import Completion, Request, unique
from .pretrained import LMLike, build_model
from .sampling import Sampling
from .wire import LOOPBACK, Wire, interruptible

MEET = timedelta(minutes=5)
FOREVER = timedelta(days=365)  # between two rollouts there may be any evaluation


class Setup(NamedTuple):
    """What the process is given when it is started."""

    port: int
    lm: LMLike
    vocab_size: int
    autocast: str | None
    device: str
    n_rows: int


def serve(setup: Setup) -> None:
    """Build the model, and answer until the process that started this one ends, or ends this one.

    It ends in order: what libraries have registered, as tqdm a semaphore, is reported as leaked of one who is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the trainer decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _answer_all(setup)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already


def _answer_all(setup: Setup) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = dist.TCPStore(LOOPBACK, setup.port, is_master=False, timeout=MEET)
    try:
        writer = Writer(setup)
    except Exception as error:
        store.set("refused", f"{type(error).__name__}: {error}")
        return
    store.set("ready", "1")
    wire = Wire(store, rank=1, patience=FOREVER)
    while True:
        try:
            header, tensors = interruptible(wire.receive)
        except RuntimeError:  # the trainer has gone
            return
        try:
            answer = writer.answer(header, tensors)
        except Exception as error:
            wire.send({"error": f"{type(error).__name__}: {error}"})
        else:
            wire.send({}, answer)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "started by a LocalEngine"
    connection.wait([parent.sentinel])
    os._exit(0)  # from whatever the other thread waits for


class Writer:
    """A language model that writes, without a critic."""

    def __init__(self, setup: Setup) -> None:
        model = build_model(setup.lm, train=None)
        if model.config.is_encoder_decoder:
            raise ValueError(f"Expected a causal language model, got {type(model).__name__}.")
        backbone = Backbone(model, setup.vocab_size, PROBE_LENGTH)  # lengths are checked with each request
        self.lm = LMActorCritic(backbone, nn.Identity(), autocast=setup.autocast).to(setup.device).eval()
        self.weights = dict(unique(model.state_dict()))
        self.n_rows = setup.n_rows

    def answer(self, header: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
        """Do what a message asks for; return the tensors of the answer."""
        if header["do"] == "load":
            self.load(dict(zip(header["names"], tensors, strict=True)))
            return []
        requests = [
            Request(tokens, int(most_new), tuple(stops.tolist()))
            for tokens, most_new, stops in zip(unpack(*tensors[:2]), tensors[2], unpack(*tensors[3:]), strict=True)
        ]
        written = write(self.lm, requests, header["temperature"], header["seed"], self.n_rows)
        return [*pack([one.tokens for one in written]), torch.as_tensor(np.concatenate([c.log_probs for c in written]))]

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over weights; those of another model are refused."""
        unlike = sorted(weights.keys() ^ self.weights.keys())
        unlike += sorted(n for n in weights.keys() & self.weights.keys() if weights[n].shape != self.weights[n].shape)
        if unlike:
            raise ValueError(f"Expected the weights of the engine's model, got those of another: {unlike[:5]} differ.")
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        self.lm.drop_caches()


@torch.no_grad()
def write(
    lm: LMActorCritic, requests: Sequence[Request], temperature: float, seed: int, n_rows: int
) -> list[Completion]:
    """Continue texts, `n_rows` side by side at most; a row that ends makes room for the next text.

    Raises:
        ValueError: If a text would be longer than the model can read.
    """
    lm.backbone.check_length(max(len(request.tokens) + request.most_new for request in requests))
    lm.sampling = Sampling(temperature)
    generator = torch.Generator().manual_seed(seed)
    n_rows, waiting = min(n_rows, len(requests)), deque(range(len(requests)))
    width = 1 + max(len(request.tokens) + request.most_new for request in requests)
    rows = np.full((n_rows, width), PADDING, dtype=np.int64)
    of_row = np.full(n_rows, -1)  # which request
    written: list[list[tuple[int, float]]] = [[] for _ in requests]
    while True:
        for row in np.flatnonzero(of_row < 0).tolist():
            rows[row] = PADDING
            rows[row, 0] = SEPARATOR  # of an empty row nobody looks
            if waiting:
                of_row[row] = waiting.popleft()
                tokens = requests[of_row[row]].tokens
                rows[row, : len(tokens)], rows[row, len(tokens)] = tokens, SEPARATOR
        if (of_row < 0).all():
            break
        step = lm.act(torch.as_tensor(rows, device=lm.backbone.device), False, generator, lm.rollout_cache)
        chosen = zip(of_row.tolist(), step.actions.tolist(), step.log_probs.tolist(), strict=True)
        for row, (number, token, log_prob) in enumerate(chosen):
            if number < 0:
                continue
            written[number].append((token, log_prob))
            request, n = requests[number], len(written[number])
            if token in request.stop_ids or n == request.most_new:
                of_row[row] = -1
            else:
                rows[row, len(request.tokens) + n] = token
    lm.drop_caches()
    return [
        Completion(np.array([token for token, _ in one]), np.array([p for _, p in one], dtype=np.float32))
        for one in written
    ]


def pack(arrays: Sequence[np.ndarray | tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Return whole numbers of several arrays one behind the other, and how many each has."""
    flat = np.concatenate([np.asarray(array, dtype=np.int64) for array in arrays])
    return torch.as_tensor(flat), torch.tensor([len(array) for array in arrays])


def unpack(flat: Tensor, counts: Tensor) -> list[np.ndarray]:
    """Return the arrays that `pack` was given."""
    return np.split(flat.numpy(), np.cumsum(counts.numpy())[:-1])
