"""The wire between a client and the servers of blocks: tensors and JSON alone, and how both sides take failures."""

import errno
import json
import multiprocessing.connection
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from io import StringIO
from multiprocessing.connection import Client, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from tests.helpers.remote import KEY, N_BLOCKS, RemoteBlocks, listen, remote_blocks, remote_chain, remote_wire, served
from tests.helpers.remote import save as save_model

HIDDEN = 16
EXPLODED: list[str] = []


class Doubling:
    """A `remote_wire.Host` without a model: it doubles everything."""

    first, last, hidden_size = 0, 1, HIDDEN

    def forward(self, hidden):
        return 2 * hidden

    def backward(self, hidden, gradient):
        return 2 * gradient

    def open(self, max_length):
        return []

    def step(self, session, hidden):
        if float(hidden.max()) > 100:
            raise FloatingPointError("too much for it")
        return 2 * hidden


@pytest.fixture
def address():
    listener = listen(Doubling())
    yield listener.address
    listener.close()


def connect(address, seconds=10.0, key=KEY):
    return remote_chain.Server(address, key, seconds, remote_chain.Counter())


def ask(connection, data):
    """Send bytes, and return the header of the answer."""
    connection.send_bytes(data)
    assert connection.poll(10)
    return remote_wire.Message.unpack(connection.recv_bytes()).header


def raw(address):
    """Connect without the example's client, to send bytes that it never would."""
    return Client(address, authkey=KEY)


def test_a_message_comes_back_as_it_was():
    message = remote_wire.Message({"verb": "step", "session": 3}, {"hidden": torch.randn(2, 3, HIDDEN)})
    again = remote_wire.Message.unpack(message.pack())
    assert again.header == message.header and torch.equal(again.tensors["hidden"], message.tensors["hidden"])
    half = remote_wire.Message({}, {"hidden": torch.ones(1, 1, 4, dtype=torch.bfloat16)})
    assert remote_wire.Message.unpack(half.pack()).tensors["hidden"].dtype == torch.float32


def test_verbs_are_answered_and_counted(address):
    server, hidden = connect(address), torch.randn(2, 3, HIDDEN)
    assert server.name.startswith("blocks 0 to 0 at 127.0.0.1:")
    assert torch.equal(server.forward(hidden), 2 * hidden)
    assert torch.equal(server.backward(hidden, hidden), 2 * hidden)
    assert server.traffic["forward", "messages"] == 2
    assert 2 * hidden.numel() * 4 < server.traffic["forward", "bytes"] < 2 * hidden.numel() * 4 + 500


class Bomb:
    def __reduce__(self):
        return EXPLODED.append, ("in the server",)


def message(header, **tensors):
    return save(
        {
            "header": torch.frombuffer(bytearray(header), dtype=torch.uint8),
            **{name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        }
    )


ROWS = torch.zeros(2, 3, HIDDEN)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "Expected a safetensors file"),
        (b"no tensors at all", "Expected a safetensors file"),
        (pickle.dumps(Bomb()), "Expected a safetensors file"),
        (save({"hidden": ROWS}), "Expected a safetensors file with JSON in `header`"),
        (message(b"{not json"), "Expected a safetensors file with JSON in `header`"),
        (message(b"[1]"), r"an object in `header`, got \[1\]"),
        (message(b'{"verb": "forward"}', hidden=ROWS.double()), r"float32 tensors \(B, T, H\)"),
        (message(b'{"verb": "forward"}', hidden=ROWS[0]), r"float32 tensors \(B, T, H\)"),
        (message(b'{"verb": "forward"}', hidden=ROWS[:, :, 1:]), r"each \(B, T, 16\), got .*15"),
        (message(b'{"verb": "forward"}', hidden=ROWS[:0]), r"each \(B, T, 16\), got"),
        (message(b'{"verb": "forward"}'), "Expected .*hidden.*, got {}"),
        (message(b'{"verb": "backward"}', hidden=ROWS, gradient=ROWS[:1]), "Expected a gradient of"),
        (message(b'{"verb": "__init__"}'), "Expected a known verb, got '__init__'"),
        (message(b'{"verb": "open", "rows": 0, "max_length": 3}'), "Expected sessions of 1 to"),
        (message(b'{"verb": "open", "rows": 1000000, "max_length": 1000000}'), "Expected sessions of 1 to"),
        (message(b'{"verb": "open", "rows": true, "max_length": "3"}'), "Expected whole numbers"),
        (message(b'{"verb": "step", "session": 9}', hidden=ROWS), "Expected an open session, got 9"),
    ],
)
def test_malformed_messages_are_refused_and_the_server_continues(data, error, address):
    with raw(address) as connection:
        with pytest.raises(AssertionError, match=error):
            assert "error" not in (answer := ask(connection, data)), answer["error"]
        assert ask(connection, message(b'{"verb": "about"}')) == {"first": 0, "last": 1, "hidden_size": HIDDEN}
    assert EXPLODED == []


def test_a_session_takes_its_rows_and_length_and_belongs_to_its_connection(address):
    with raw(address) as connection, raw(address) as other:
        assert ask(connection, message(b'{"verb": "open", "rows": 2, "max_length": 4}')) == {"session": 1}
        step = b'{"verb": "step", "session": 1}'
        assert ask(connection, message(step, hidden=ROWS)) == {}
        assert "2 rows and at most 1 tokens more" in ask(connection, message(step, hidden=ROWS))["error"]
        assert "2 rows and" in ask(connection, message(step, hidden=ROWS[:1, :1]))["error"]
        assert "open session, got 1" in ask(other, message(step, hidden=ROWS))["error"]
        assert ask(connection, message(step, hidden=ROWS[:, :1])) == {}
        assert ask(connection, message(b'{"verb": "open", "rows": 2, "max_length": 4}')) == {"session": 2}
        other_step = b'{"verb": "step", "session": 2}'
        answer = ask(connection, message(other_step, hidden=ROWS + 101))
        assert answer == {"error": "FloatingPointError: too much for it"}  # its state may have changed: it is closed
        assert "open session, got 2" in ask(connection, message(other_step, hidden=ROWS))["error"]
        assert ask(connection, message(b'{"verb": "close", "sessions": [1]}')) == {}
        assert "open session, got 1" in ask(connection, message(step, hidden=ROWS[:, :1]))["error"]


def test_messages_that_are_too_large_are_refused_on_both_sides(address, monkeypatch):
    server, large = connect(address), torch.zeros(1, 100, HIDDEN)
    monkeypatch.setattr(remote_wire, "MAX_BYTES", 5000)
    with pytest.raises(remote_wire.MessageError, match="at most 5,000 bytes, got 6,"):
        server.call("forward", hidden=large)
    with raw(address) as connection:  # a client that does not check
        connection.send_bytes(message(b'{"verb": "forward"}', hidden=large))
        with pytest.raises((EOFError, ConnectionError)):
            connection.recv_bytes()
    assert torch.equal(connect(address).forward(ROWS), 2 * ROWS)


def test_nothing_is_pickled(address, monkeypatch):
    """Neither side calls `send` or `recv` of a connection, which pickle."""

    def refuse(self, *args):
        raise AssertionError("a pickle on the wire")

    monkeypatch.setattr(multiprocessing.connection.Connection, "send", refuse)
    monkeypatch.setattr(multiprocessing.connection.Connection, "recv", refuse)
    with remote_chain_of(address) as chain:
        session = chain.open(2, 8)
        assert torch.equal(session(ROWS), 2 * ROWS)
        assert torch.equal(chain(ROWS), 2 * ROWS)


class remote_chain_of:
    """A context with the chain of one server."""

    def __init__(self, address):
        self.server = connect(address)

    def __enter__(self):
        return remote_chain.Chain([self.server], 1, self.server.traffic)

    def __exit__(self, *exc):
        self.server.connection.close()


def test_another_key_is_refused_and_a_silent_client_blocks_nobody(address, capfd):
    earlier = set(threading.enumerate())
    silent = Client(address)  # never answers the challenge
    with pytest.raises(PermissionError, match="Expected the key of the server at 127"):
        connect(address, key=b"another")
    assert torch.equal(connect(address).forward(ROWS), 2 * ROWS)
    silent.close()
    # `deliver_challenge` of multiprocessing.connection sends the refusal before it raises, so that the client may get
    # here before the server's thread has printed. Polling capfd is no way to wait: it can lose output.
    for thread in set(threading.enumerate()) - earlier:
        thread.join(30)
    assert "AuthenticationError" in capfd.readouterr().err


def test_a_missing_server_is_reported():
    with Listener(("127.0.0.1", 0)) as listener:
        address = listener.address
        with pytest.raises(remote_chain.BlocksLostError, match="no challenge"):
            connect(address, seconds=0.1)  # something listens there, but sends nothing
    with pytest.raises(remote_chain.BlocksLostError, match="Expected a server of blocks at 127"):
        connect(address)


@contextmanager
def answering(behave, first, last):
    """Yield a client of a server that answers its first request and then calls `behave(connection, done)`."""
    done = threading.Event()

    def serve_once(listener):
        with listener.accept() as connection:
            deliver_challenge(connection, KEY)
            answer_challenge(connection, KEY)
            connection.recv_bytes()
            about = {"first": first, "last": last, "hidden_size": HIDDEN}
            connection.send_bytes(remote_wire.Message(about, {}).pack())
            behave(connection, done)

    with Listener(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_once, args=(listener,), daemon=True)
        thread.start()
        yield connect(listener.address, seconds=0.2)
        done.set()
        thread.join(5)


@pytest.mark.parametrize(("hangs", "reason"), [(True, "no answer in 0.2 seconds"), (False, "EOFError|ConnectionReset")])
def test_a_server_that_hangs_or_dies_names_its_blocks(hangs, reason):
    """The server answers the first request, and no other."""

    def stay_silent(connection, done):
        connection.recv_bytes()
        if hangs:
            done.wait(10)

    with answering(stay_silent, 5, 9) as server:
        for _ in range(2):  # the connection stays closed
            with pytest.raises(remote_chain.BlocksLostError, match=f"blocks 5 to 8 at .*({reason}|closed).*are lost"):
                server.forward(ROWS)


@pytest.mark.parametrize("sends", [False, True])
def test_silence_in_the_middle_of_a_message_ends_the_call(sends):
    """Either the server sends half an answer, or the client sends more than the server reads."""

    def answer_half(connection, done):
        if not sends:
            connection.recv_bytes()
            os.write(connection.fileno(), struct.pack("!i", 1000) + b"the rest never comes")
        done.wait(10)

    with answering(answer_half, 0, 1) as server:
        with pytest.raises(remote_chain.BlocksLostError, match=r"no answer in 0\.2 seconds"):
            server.forward(torch.zeros(1, 1 << 19, HIDDEN) if sends else ROWS)


def test_a_silent_client_is_disconnected(monkeypatch, capfd):
    monkeypatch.setattr(remote_wire, "HANDSHAKE_SECONDS", 1.0)  # enough for the handshake on a busy machine
    listener = listen(Doubling())
    server = connect(listener.address)
    silent = Client(listener.address)
    assert silent.poll(5) and silent.recv_bytes()  # the challenge
    assert silent.poll(5)
    with pytest.raises((EOFError, ConnectionError)):
        silent.recv_bytes()
    assert torch.equal(server.forward(ROWS), 2 * ROWS)  # after the handshake, a client may be silent for longer
    assert "connection ended by" in capfd.readouterr().err
    silent.close()
    listener.close()


def test_too_many_open_files_do_not_end_a_server():
    class Full(Listener):
        errors = [errno.EMFILE, errno.ECONNABORTED]

        def accept(self):
            if self.errors:
                raise OSError(self.errors.pop(), "not now")
            return super().accept()

    listener = Full(("127.0.0.1", 0))
    threading.Thread(target=remote_wire.serve, args=(listener, KEY, Doubling()), daemon=True).start()
    assert torch.equal(connect(listener.address).forward(ROWS), 2 * ROWS)
    assert Full.errors == []
    listener.close()
    closed = threading.Thread(target=remote_wire.serve, args=(listener, KEY, Doubling()), daemon=True)
    closed.start()
    closed.join(5)
    assert not closed.is_alive()


@pytest.mark.parametrize("key", [b"", b"fifteen bytes  "])
def test_a_key_that_can_be_guessed_is_refused_on_both_sides(key, tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(key)
    folder, error = save_model(tmp_path / "model"), f"Expected a key of at least 16 bytes in .*, got {len(key)}"
    with pytest.raises(ValueError, match=error):
        RemoteBlocks(str(folder), (), str(tmp_path / "key")).build_backend(33, 20)
    options = ["remote_blocks.py", folder, "--first", 0, "--last", 1, "--key-file", tmp_path / "key"]
    monkeypatch.setattr(sys, "argv", list(map(str, options)))
    with pytest.raises(ValueError, match=error):
        remote_blocks.main()


def test_ctrl_c_while_servers_start_leaves_no_timer(monkeypatch):
    class Interrupted(StringIO):
        def readline(self):
            raise KeyboardInterrupt

    server = SimpleNamespace(stdin=StringIO(), stdout=Interrupted(), kill=lambda: None, wait=lambda *_: 0)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: server)
    with pytest.raises(KeyboardInterrupt), remote_blocks.serving(Path("folder"), Path("key"), [0, 1]):
        pass
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for timer in timers:
        timer.join(2)
    assert not any(timer.is_alive() for timer in timers) and server.stdin.closed


def test_missing_and_double_blocks_are_refused(tmp_path):
    with served(tmp_path) as remote:
        for addresses in (remote.addresses[:1], (*remote.addresses, remote.addresses[0])):
            with pytest.raises(ValueError, match=f"Expected servers of blocks 0 to {N_BLOCKS - 1}, got"):
                remote._replace(addresses=addresses).build()


def test_blocks_that_are_not_there_are_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    for bounds in ((2, 2), (3, 5), (-1, 2)):
        with pytest.raises(ValueError, match="Expected some of the model's 4 blocks"):
            remote_blocks.Blocks(folder, *bounds)
    with pytest.raises(ValueError, match="Expected one list of blocks with a norm behind it"):
        remote_blocks.blocks_of(torch.nn.Sequential(torch.nn.Linear(1, 1)))


@pytest.mark.slow
def test_a_killed_server_is_named_and_all_servers_end_with_their_context(tmp_path):
    folder, key = save_model(tmp_path / "model"), remote_blocks.new_key(tmp_path / "key")
    with remote_blocks.serving(folder, key, [0, 2, N_BLOCKS]) as servers:
        lm = RemoteBlocks(str(folder), tuple(server.address for server in servers), str(key)).build_backend(33, 20)
        ids, zero = torch.ones(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        assert lm(ids, zero, zero)[0].isfinite().all()
        servers[1].process.kill()
        start = time.perf_counter()
        with pytest.raises(remote_chain.BlocksLostError, match=r"blocks 2 to 3 at .* lost\. Start the server again"):
            lm(ids, zero, zero)
        assert time.perf_counter() - start < 10 and servers[0].process.poll() is None
    assert [server.process.poll() for server in servers] == [0, -9]


@pytest.mark.long
def test_servers_end_with_the_process_that_started_them(tmp_path):
    """The starting process is killed, so that it cannot close them itself."""
    folder = save_model(tmp_path / "model")
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(remote_wire.__file__).parent)!r})
from remote_blocks import new_key, serving
with serving(Path({str(folder)!r}), new_key(Path({str(tmp_path / "key")!r})), [0, {N_BLOCKS}]) as [server]:
    print(server.process.pid, server.address[1], flush=True)
    os.kill(os.getpid(), 9)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    port = int(result.stdout.split()[1])
    for _ in range(100):
        try:
            Client(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the server is still there")


def test_the_header_is_json_that_others_can_write():
    data = save({"header": torch.tensor(list(json.dumps({"verb": "about"}).encode()), dtype=torch.uint8)})
    assert remote_wire.Message.unpack(data).header == {"verb": "about"}
