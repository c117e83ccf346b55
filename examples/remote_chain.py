"""The client's side of the servers of a model's blocks: forwards and gradients through all of them, in order.

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
NUMBER_BYTES = 4  # of a float32


class BlocksLostError(ConnectionError):
    """A server is gone or does not answer; the message names its blocks."""


class RefusedError(RuntimeError):
    """A server refused a request; the message is the server's."""


class Server:
    """A connection to a server of some blocks. Any error in the middle of a call, also Ctrl-C, closes it for good.

    Args:
        address: The host and port of the server.
        key: The key that both sides know.
        seconds: The longest silence: before it is connected, before an answer begins, and between its parts.
        traffic: Counts (verb, "messages") and (verb, "bytes"), both directions together.

    Raises:
        BlocksLostError: If no server answers at the address.
        PermissionError: If the server has another key.
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
        """Send a request, and wait for the answer.

        Raises:
            BlocksLostError: If no answer comes.
            RefusedError: If the server answers with an error.
        """
        data = Message({"verb": verb, **(header or {})}, tensors).pack()
        try:
            self.connection.send_bytes(data)
            reply = self.connection.recv_bytes(MAX_BYTES)
        except BaseException as error:
            self.connection.close()  # a late answer would be taken for that of the next request
            if not isinstance(error, (OSError, EOFError)):
                raise
            got = f"no answer in {self.seconds:g} seconds" if isinstance(error, BlockingIOError) else repr(error)
            raise BlocksLostError(
                f"Expected an answer of {self.name}, got {got}: they are lost. Start the server again, and continue "
                "from the last checkpoint."
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
        """Send rows in as few messages as hold them."""
        hidden = tensors["hidden"]
        size = rows_a_message(hidden, len(tensors))
        answers = [
            self.call(verb, **{name: tensor[start : start + size] for name, tensor in tensors.items()}).tensors[wanted]
            for start in range(0, len(hidden), size)
        ]
        return torch.cat(answers).to(hidden)


def _connect(address: Address, key: bytes, seconds: float) -> Connection:
    """Connect; both sides prove that they know the key (HMAC challenges of `multiprocessing.connection`)."""
    with socket.create_connection(address, seconds) as opened:
        opened.setblocking(True)
        connection = Connection(opened.detach())
    try:
        limit(connection, seconds)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except BaseException as error:
        connection.close()
        if isinstance(error, BlockingIOError):  # another program listens there
            raise TimeoutError(f"no challenge in {seconds:g} seconds") from error
        raise
    return connection


def rows_a_message(hidden: Tensor, n_tensors: int = 1) -> int:
    """Return the number of rows of hidden states (B, T, H) that a message holds.

    Raises:
        ValueError: If not even one row fits.
    """
    n_rows = (MAX_BYTES - HEADER_BYTES) // (n_tensors * NUMBER_BYTES * hidden[0].numel())
    if n_rows < 1:
        got = f"{tuple(hidden.shape)} {n_tensors} times"
        raise ValueError(f"Expected a row to fit a message of {MAX_BYTES:,} bytes, got {got}.")
    return n_rows


class _ThroughServer(torch.autograd.Function):
    """The blocks of a server as an autograd function; the server recomputes its forward in the backward pass."""

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
    """The servers of all blocks, in order. Copies of a model share the chain, since the blocks are frozen.

    Args:
        servers: The servers, in any order.
        n_blocks: The number of blocks of the model.
        traffic: The counter of the servers.

    Raises:
        ValueError: If a block has no server, or two.
    """

    def __init__(self, servers: Sequence[Server], n_blocks: int, traffic: Counter[tuple[str, str]]) -> None:
        self.servers = sorted(servers, key=lambda server: server.first)
        self.traffic = traffic
        self.ended: list[list[int]] = []  # the numbers of ended sessions, one for each server, not yet closed there
        bounds = [0, *(server.last for server in self.servers)]
        if [server.first for server in self.servers] != bounds[:-1] or bounds[-1] != n_blocks:
            raise ValueError(
                f"Expected servers of blocks 0 to {n_blocks - 1}, got {[server.name for server in servers]}."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the hidden states behind the last block, (B, T, H); they can be differentiated once."""
        for server in self.servers:
            hidden = _ThroughServer.apply(hidden, server)
        return hidden

    def open(self, n_rows: int, max_length: int) -> Session:
        """Open a session at every server, after closing those that have ended.

        Args:
            n_rows: The number of rows.
            max_length: The most tokens of a row.
        """
        ended, self.ended = self.ended, []
        for index, server in enumerate(self.servers if ended else ()):
            # A session that a server refused to open has no number there, nor at the servers behind it.
            server.call("close", {"sessions": [number for numbers in ended for number in numbers[index : index + 1]]})
        session = Session(self, [], n_rows, max_length)  # before the calls: if one fails, the others are closed later
        for server in self.servers:
            answer = server.call("open", {"rows": n_rows, "max_length": max_length})
            session.numbers.append(int(answer.header["session"]))
        return session


class Session:
    """Rows that are decoded together, all at one position; a session ends when it is garbage-collected."""

    def __init__(self, chain: Chain, numbers: list[int], n_rows: int, max_length: int) -> None:
        self.chain, self.numbers, self.n_rows, self.max_length, self.position = chain, numbers, n_rows, max_length, 0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of new tokens behind the last block, (B, t, H)."""
        self.position += hidden.shape[1]
        for server, number in zip(self.chain.servers, self.numbers, strict=True):
            hidden = server.call("step", {"session": number}, hidden=hidden).tensors["hidden"].to(hidden)
        return hidden

    def __del__(self) -> None:
        self.chain.ended.append(self.numbers)  # no message from here: another call may be under way


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
