"""The servers of a model's blocks from the client's side: asked in order, counted, differentiated through.

python examples/remote_chain.py runs nothing by itself: see examples/remote_backend.py
"""

from __future__ import annotations

import argparse
import socket
from collections import Counter
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch
from remote_wire import HEADER_BYTES, MAX_BYTES, Message, limit
from torch import Tensor
from torch.autograd.function import once_differentiable

Address = tuple[str, int]
NUMBER_BYTES = 4  # bytes of a number


class BlocksLostError(ConnectionError):
    """A server is gone, or does not answer; the message says which blocks it had."""


class RefusedError(RuntimeError):
    """A server says what was wrong."""


class Server:
    """A connection to a server of some blocks. Whatever ends a call in the middle, Ctrl-C too, closes it for good.

    Args:
        address: Where it listens.
        key: What both sides know.
        seconds: How long it may be silent: before it is connected, before an answer begins, and between its parts.
        traffic: Counts (verb, "messages") and (verb, "bytes"), both directions together.

    Raises:
        BlocksLostError: If nothing answers there.
        PermissionError: If it has another key.
    """

    def __init__(self, address: Address, key: bytes, seconds: float, traffic: Counter[tuple[str, str]]) -> None:
        self.name, self.seconds, self.traffic = f"{address[0]}:{address[1]}", seconds, traffic
        try:
            self.connection = _connect(address, key, seconds)
        except AuthenticationError as error:
            raise PermissionError(f"Expected the key of the server at {self.name}, got another: {error}.") from error
        except (OSError, EOFError) as error:
            raise BlocksLostError(f"Expected a server of blocks at {self.name}, got {error!r}. Start it.") from error
        about = self.call("about").header
        self.first, self.last, self.hidden_size = (int(about[name]) for name in ("first", "last", "hidden_size"))
        self.name = f"blocks {self.first} to {self.last - 1} at {self.name}"

    def call(self, verb: str, header: dict[str, Any] | None = None, **tensors: Tensor) -> Message:
        """Ask for something and wait for the answer.

        Raises:
            BlocksLostError: If there is none.
            RefusedError: If the server says what was wrong.
        """
        data = Message({"verb": verb, **(header or {})}, tensors).pack()
        try:
            self.connection.send_bytes(data)
            reply = self.connection.recv_bytes(MAX_BYTES)
        except BaseException as error:
            self.connection.close()  # an answer that came later would be taken for the next one's
            if not isinstance(error, (OSError, EOFError)):
                raise
            got = f"no answer in {self.seconds:g} seconds" if isinstance(error, BlockingIOError) else repr(error)
            raise BlocksLostError(
                f"Expected an answer of {self.name}, got {got}: they are lost. Start the server again, and go on from "
                "the last checkpoint."
            ) from error
        self.traffic[verb, "messages"] += 2
        self.traffic[verb, "bytes"] += len(data) + len(reply)
        answer = Message.unpack(reply)
        if "error" in answer.header:
            raise RefusedError(f"Expected {self.name} to {verb}, got: {answer.header['error']}")
        return answer

    def forward(self, hidden: Tensor) -> Tensor:
        return self._in_parts("forward", "hidden", hidden=hidden)

    def backward(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        return self._in_parts("backward", "gradient", hidden=hidden, gradient=gradient)

    def _in_parts(self, verb: str, wanted: str, **tensors: Tensor) -> Tensor:
        """Send as many rows at a time as a message holds."""
        hidden = tensors["hidden"]
        size = rows_a_message(hidden, len(tensors))
        answers = [
            self.call(verb, **{name: tensor[start : start + size] for name, tensor in tensors.items()}).tensors[wanted]
            for start in range(0, len(hidden), size)
        ]
        return torch.cat(answers).to(hidden)


def _connect(address: Address, key: bytes, seconds: float) -> Connection:
    """Connect, and let both sides prove that they know the key."""
    with socket.create_connection(address, seconds) as opened:
        opened.setblocking(True)
        connection = Connection(opened.detach())
    try:
        limit(connection, seconds)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except BaseException as error:
        connection.close()
        if isinstance(error, BlockingIOError):  # it is something else that listens there
            raise TimeoutError(f"no challenge in {seconds:g} seconds") from error
        raise
    return connection


def rows_a_message(hidden: Tensor, n_tensors: int = 1) -> int:
    """Return how many rows of hidden states (B, T, H) a message holds.

    Raises:
        ValueError: If a single one is too many.
    """
    n_rows = (MAX_BYTES - HEADER_BYTES) // (n_tensors * NUMBER_BYTES * hidden[0].numel())
    if n_rows < 1:
        got = f"{tuple(hidden.shape)} {n_tensors} times"
        raise ValueError(f"Expected a row to fit a message of {MAX_BYTES:,} bytes, got {got}.")
    return n_rows


class _ThroughServer(torch.autograd.Function):
    """The blocks of a server as an operation: it computes its forward again where a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, server: Server) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.server = server
        return server.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.server.backward(*ctx.saved_tensors, gradient), None


class Chain:
    """The servers of all blocks, in order. Copies of a model share it: the blocks are frozen, and there is one of each.

    Args:
        servers: The servers.
        n_blocks: How many blocks there are.
        traffic: What the servers count in.

    Raises:
        ValueError: If a block is missing, or with two servers.
    """

    def __init__(self, servers: Sequence[Server], n_blocks: int, traffic: Counter[tuple[str, str]]) -> None:
        self.servers = sorted(servers, key=lambda server: server.first)
        self.traffic = traffic
        self.ended: list[list[int]] = []  # sessions that nobody holds
        bounds = [0, *(server.last for server in self.servers)]
        if [server.first for server in self.servers] != bounds[:-1] or bounds[-1] != n_blocks:
            raise ValueError(f"Expected servers of blocks 0 to {n_blocks - 1}, got {[one.name for one in servers]}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return what is behind the last block, (B, T, H), to be differentiated once."""
        for server in self.servers:
            hidden = _ThroughServer.apply(hidden, server)
        return hidden

    def open(self, n_rows: int, max_length: int) -> Session:
        """Open a session of some rows at every server; those that have ended are closed."""
        ended, self.ended = self.ended, []
        for place, server in enumerate(self.servers if ended else ()):
            server.call("close", {"sessions": [number for numbers in ended for number in numbers[place : place + 1]]})
        session = Session(self, [], n_rows, max_length)  # which ends, if a server refuses, where it was opened
        for server in self.servers:
            answer = server.call("open", {"rows": n_rows, "max_length": max_length})
            session.numbers.append(int(answer.header["session"]))
        return session


class Session:
    """Rows that are decoded together, at one position; it ends when nobody holds it any more."""

    def __init__(self, chain: Chain, numbers: list[int], n_rows: int, max_length: int) -> None:
        self.chain, self.numbers, self.n_rows, self.max_length, self.position = chain, numbers, n_rows, max_length, 0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return what is behind the last block for new tokens, (B, t, H)."""
        self.position += hidden.shape[1]
        for server, number in zip(self.chain.servers, self.numbers, strict=True):
            hidden = server.call("step", {"session": number}, hidden=hidden).tensors["hidden"].to(hidden)
        return hidden

    def __del__(self) -> None:
        self.chain.ended.append(self.numbers)  # no message from here: another may be under way


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
