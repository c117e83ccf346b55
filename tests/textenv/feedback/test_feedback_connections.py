"""Idle connections of the rating server: the time for a request, and the number per address, are limited."""

import select
import socket
import threading
import time
from urllib.request import urlopen

import pytest

pytest.importorskip("starlette", reason="needs starlette: pip install textenv[feedback]")

import uvicorn

from textenv.feedback import connections, web
from textenv.feedback.store import FeedbackStore

HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-More: "
BODY = (
    b"POST /api/next HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\n"
    b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
)
WHOLE = b"GET /static/icon.svg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
PATIENCE = 30.0


@pytest.fixture
def port(tmp_path, monkeypatch):
    """Run `serve` in a thread, and return its port."""
    running, addresses, run = [], [], uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: (running.append(server), run(server, sockets)))
    started = threading.Event()

    def announce(address):
        addresses.append(address)
        started.set()

    with FeedbackStore(tmp_path / "answers.db") as store:
        thread = threading.Thread(target=web.serve, args=(store,), kwargs={"announce": announce})
        thread.start()
        assert started.wait(PATIENCE)
        yield int(addresses[0].split(":")[2].strip("/"))
        while not running:
            time.sleep(0.01)
        running[0].should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def connect(port, sent):
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.sendall(sent)
    return connection


def is_closed(connection, seconds=0.0):
    """Return whether the server closed a connection without answering."""
    if not select.select([connection], [], [], seconds)[0]:
        return False
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def answer(connection):
    """Read the server's answer to WHOLE, which arrives in pieces."""
    received = b""
    while b"</svg>" not in received:
        chunk = connection.recv(1 << 16)
        assert chunk, received
        received += chunk
    return received


def page(port):
    with urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as response:
        return response.status


def test_the_oldest_of_many_idle_connections_are_closed_and_pages_are_served(port, caplog):
    idle = [connect(port, (b"", HALF, BODY)[n % 3]) for n in range(150)]
    assert page(port) == 200
    for _ in range(500):
        if (closed := [is_closed(connection) for connection in idle]).count(False) <= connections.FROM_ONE_ADDRESS:
            break
        time.sleep(0.02)
    assert closed.count(False) <= connections.FROM_ONE_ADDRESS
    assert closed[:100] == [True] * 100 and not all(closed)
    assert not caplog.records


def test_the_time_for_a_request_is_limited_even_if_it_trickles_in(port, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    for sent in (b"", HALF, BODY):
        assert is_closed(connect(port, sent), PATIENCE)
    trickling = connect(port, HALF)
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        for _ in range(1000):
            trickling.sendall(b"x")
            time.sleep(0.02)
    # a second request's time begins with its first byte, and an answered one has no limit
    kept = connect(port, WHOLE)
    assert answer(kept).startswith(b"HTTP/1.1 200")
    time.sleep(0.7)
    kept.sendall(WHOLE)
    assert answer(kept).startswith(b"HTTP/1.1 200")
    kept.sendall(HALF)
    assert is_closed(kept, PATIENCE)


def test_a_connection_that_waits_for_an_answer_is_not_closed(port, monkeypatch):
    """If all connections of an address are being answered, a new one is closed."""
    monkeypatch.setattr(connections, "FROM_ONE_ADDRESS", 2)
    go = threading.Event()
    monkeypatch.setattr(web.Pages, "page", lambda pages, request, name: go.wait(PATIENCE) and web.Response(name))
    asking = [connect(port, WHOLE.replace(b"static/icon.svg", b"")) for _ in range(2)]
    time.sleep(0.3)
    assert is_closed(connect(port, WHOLE), PATIENCE)
    go.set()
    assert [connection.recv(1 << 20)[:12] for connection in asking] == [b"HTTP/1.1 200"] * 2


def test_invalid_requests_are_not_logged(port, capfd):
    for _ in range(20):
        broken = connect(port, b"\0\1\2\r\n\r\n")
        assert broken.recv(1 << 16).startswith(b"HTTP/1.1 400")
    assert capfd.readouterr() == ("", "")
