"""The messages between a language model's client and the servers of its blocks, and the server's loop.

python examples/remote_wire.py runs nothing by itself: see examples/remote_backend.py

A message is a safetensors file: float32 tensors (B, T, H), and JSON as the bytes of a tensor `header`. Nothing is ever
unpickled. This module needs torch and safetensors alone, so that a server may run in an environment of its own, with
other versions of transformers.

======== ======================= ================================= =============================================
verb     in the header           tensors                           answer
======== ======================= ================================= =============================================
about                                                              `first`, `last`, `hidden_size`
forward                          hidden (B, T, H)                  hidden (B, T, H) behind the last block
backward                         hidden (B, T, H), gradient of     gradient (B, T, H) by the first one; the forward
                                 what is behind the last block     is computed again, and nothing is trained
open     `rows`, `max_length`                                      `session`, at position 0
step     `session`               hidden (B, t, H) of new tokens    hidden (B, t, H); the position grows by t
close    `sessions`                                                nothing
======== ======================= ================================= =============================================

All rows of a session are at one position, and there are no padding masks. The answer to a failed request has `error`.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

MAX_BYTES = 1 << 26  # the longest message: 64 MiB, against a client that fills the server's memory
HEADER_BYTES = 1 << 12  # the most that `header` and the header of safetensors add to the tensors
MAX_HELD = 1 << 20  # tokens that the open sessions of a connection may hold
KEY_BYTES = 16  # the shortest key: 128 bits cannot be guessed
HANDSHAKE_SECONDS = 10.0  # the longest silence of a client that has not yet proved to know the key
CLOSED = (
    None,
    errno.EBADF,
    errno.EINVAL,
    errno.ENOTSOCK,
)  # a closed listener; other errors, such as EMFILE, are temporary


class MessageError(ValueError):
    """A message breaks the protocol; the text says how."""


class Message(NamedTuple):
    """A request or an answer."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]  # float32, (B, T, H)

    def pack(self) -> bytes:
        """Return the message as bytes.

        Raises:
            MessageError: If it is too large.
        """
        header = torch.frombuffer(bytearray(json.dumps(self.header).encode()), dtype=torch.uint8)
        # Copied, since safetensors refuses tensors that share memory, and a gradient may share that of another tensor.
        contiguous = torch.contiguous_format
        tensors = {
            name: tensor.detach().float().cpu().clone(memory_format=contiguous) for name, tensor in self.tensors.items()
        }
        data = safetensors.torch.save({"header": header, **tensors})
        if len(data) > MAX_BYTES:
            raise MessageError(f"Expected a message of at most {MAX_BYTES:,} bytes, got {len(data):,}.")
        return data

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        """Return the message in some bytes.

        Raises:
            MessageError: If they are no message.
        """
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(bytes(tensors.pop("header").tolist()))
        except (SafetensorError, KeyError, ValueError) as error:
            raise MessageError(f"Expected a safetensors file with JSON in `header`, got: {error!r:.200}") from error
        wrong = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32 or tensor.ndim != 3]
        if not isinstance(header, dict) or wrong:
            raise MessageError(f"Expected float32 tensors (B, T, H) and an object in `header`, got {wrong or header}.")
        return cls(header, tensors)


def read_key(file: str | Path) -> bytes:
    """Return the key in a file.

    Raises:
        ValueError: If it is shorter than `KEY_BYTES`.
    """
    key = Path(file).read_bytes()
    if len(key) < KEY_BYTES:
        raise ValueError(f"Expected a key of at least {KEY_BYTES} bytes in {file}, got {len(key)}. Write a random one.")
    return key


def limit(connection: Connection, seconds: float | None) -> None:
    """Make reads and writes of a connection raise `BlockingIOError` after so many seconds; None waits for ever."""
    # `Connection` has no timeout of its own, so the socket gets it. `fileno` is duplicated: the socket closes its own.
    whole, rest = divmod(0 if seconds is None else max(1, round(seconds * 1e6)), 10**6)
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            duplicate.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, rest))  # a timeval


class Host(Protocol):
    """The holder of the blocks `first` to `last` - 1 of a model."""

    first: int
    last: int
    hidden_size: int

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states behind the last block, (B, T, H)."""
        ...

    def backward(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to `hidden`, given that of the result of `forward`."""
        ...

    def open(self, max_length: int) -> Any:
        """Return the state of a new session, for at most `max_length` tokens per row."""
        ...

    def step(self, session: Any, hidden: Tensor) -> Tensor:
        """Read the hidden states of a session's new tokens, (B, t, H); return those behind the last block."""
        ...


@dataclass
class _Session:
    state: Any
    rows: int
    max_length: int
    position: int = 0


class _Talk:
    """The requests of one connection, and its sessions, which end with it."""

    def __init__(self, host: Host, lock: threading.Lock, max_held: int) -> None:
        self.host, self.lock, self.max_held = host, lock, max_held
        self.sessions: dict[int, _Session] = {}
        self.n_opened = 0

    def answer(self, data: bytes) -> bytes:
        try:
            message = Message.unpack(data)
            verb = message.header.get("verb")
            if verb not in ("about", "forward", "backward", "open", "step", "close"):
                raise MessageError(f"Expected a known verb, got {verb!r:.80}.")
            with self.lock:  # one computation at a time
                return getattr(self, verb)(message).pack()
        except Exception as error:  # the client's mistake, such as a shape that the model cannot take
            return Message({"error": f"{type(error).__name__}: {error}"[:2000]}, {}).pack()

    def about(self, message: Message) -> Message:
        host = self.host
        return Message({"first": host.first, "last": host.last, "hidden_size": host.hidden_size}, {})

    def forward(self, message: Message) -> Message:
        return Message({}, {"hidden": self.host.forward(*self._tensors(message, "hidden"))})

    def backward(self, message: Message) -> Message:
        hidden, gradient = self._tensors(message, "hidden", "gradient")
        if hidden.shape != gradient.shape:
            raise MessageError(f"Expected a gradient of {tuple(hidden.shape)}, got {tuple(gradient.shape)}.")
        return Message({}, {"gradient": self.host.backward(hidden, gradient)})

    def open(self, message: Message) -> Message:
        rows, max_length = self._numbers(message, "rows", "max_length")
        held = sum(session.rows * session.max_length for session in self.sessions.values()) + rows * max_length
        if min(rows, max_length) < 1 or held > self.max_held:
            raise MessageError(
                f"Expected sessions of 1 to {self.max_held:,} tokens in all, got {held:,}. Close some, or start the "
                "server with more (--max-held)."
            )
        self.n_opened += 1
        self.sessions[self.n_opened] = _Session(self.host.open(max_length), rows, max_length)
        return Message({"session": self.n_opened}, {})

    def step(self, message: Message) -> Message:
        [number], [hidden] = self._numbers(message, "session"), self._tensors(message, "hidden")
        session = self.sessions.get(number)
        if session is None:
            raise MessageError(f"Expected an open session, got {number}.")
        if len(hidden) != session.rows or session.position + hidden.shape[1] > session.max_length:
            raise MessageError(
                f"Expected {session.rows} rows and at most {session.max_length - session.position} tokens more, got "
                f"{tuple(hidden.shape)}."
            )
        del self.sessions[number]  # a step that fails may have changed part of the state
        result = self.host.step(session.state, hidden)
        session.position += hidden.shape[1]
        self.sessions[number] = session
        return Message({}, {"hidden": result})

    def close(self, message: Message) -> Message:
        for number in message.header["sessions"]:
            self.sessions.pop(number, None)
        return Message({}, {})

    def _tensors(self, message: Message, *names: str) -> list[Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in message.tensors.items()}
        fits = all(shape[-1] == self.host.hidden_size and min(shape) > 0 for shape in shapes.values())
        if shapes.keys() != set(names) or not fits:
            raise MessageError(f"Expected {names}, each (B, T, {self.host.hidden_size}), got {shapes}.")
        return [message.tensors[name] for name in names]

    def _numbers(self, message: Message, *names: str) -> list[int]:
        numbers = [message.header.get(name) for name in names]
        if any(type(number) is not int for number in numbers):  # not isinstance: a bool is an int
            raise MessageError(f"Expected whole numbers for {names}, got {numbers!r:.200}.")
        return numbers


def serve(listener: Listener, key: bytes, host: Host, max_held: int = MAX_HELD) -> None:
    """Answer each client that knows the key, in a thread of its own, until the listener is closed.

    Args:
        listener: A listener without an `authkey`, whose handshake would let a silent client keep all others waiting.
        key: The key that both sides know.
        host: The holder of the blocks.
        max_held: The most tokens that the open sessions of a connection may hold, empty slots included.
    """
    lock = threading.Lock()
    while True:
        try:
            connection = listener.accept()
        except OSError as error:
            if error.errno in CLOSED:
                return
            time.sleep(0.1)  # too many open connections end neither the server nor the others
            continue
        threading.Thread(target=_talk, args=(connection, key, _Talk(host, lock, max_held)), daemon=True).start()


def _talk(connection: Connection, key: bytes, talk: _Talk) -> None:
    with connection:
        try:
            limit(connection, HANDSHAKE_SECONDS)
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            limit(connection, None)  # a client may think for long
            while True:
                connection.send_bytes(talk.answer(connection.recv_bytes(MAX_BYTES)))
        except EOFError:
            return  # the client is done
        except (OSError, AuthenticationError) as error:  # another key, too large a message, or a client that died
            print(f"blocks {talk.host.first} to {talk.host.last - 1}: connection ended by {error!r}", file=sys.stderr)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
