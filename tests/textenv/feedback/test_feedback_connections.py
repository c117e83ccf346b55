"""Connections of the rating server that ask for nothing: each has its time, and an address has so many."""

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
    """Of a server in a thread, as `serve` runs it."""
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
    made = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    made.sendall(sent)
    return made


def is_closed(made, seconds=0.0):
    """Whether the server closed a connection, without having answered anything."""
    if not select.select([made], [], [], seconds)[0]:
        return False
    try:
        return made.recv(1) == b""
    except ConnectionResetError:
        return True


def answer(made):
    """What the server answers to WHOLE, which comes in pieces."""
    received = b""
    while b"</svg>" not in received:
        part = made.recv(1 << 16)
        assert part, received
        received += part
    return received


def page(port):
    with urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as response:
        return response.status


def test_of_many_that_ask_for_nothing_the_oldest_go_and_pages_are_served(port, caplog):
    idle = [connect(port, (b"", HALF, BODY)[n % 3]) for n in range(150)]
    assert page(port) == 200
    for _ in range(500):
        if (closed := [is_closed(one) for one in idle]).count(False) <= connections.FROM_ONE_ADDRESS:
            break
        time.sleep(0.02)
    assert closed.count(False) <= connections.FROM_ONE_ADDRESS
    assert closed[:100] == [True] * 100 and not all(closed)
    assert not caplog.records


def test_a_request_has_its_time_however_it_trickles_in(port, monkeypatch):
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


def test_who_waits_for_an_answer_is_not_dropped(port, monkeypatch):
    """Every connection of the address is in the middle of an answer: the new one has to go."""
    monkeypatch.setattr(connections, "FROM_ONE_ADDRESS", 2)
    go = threading.Event()
    monkeypatch.setattr(web.Pages, "page", lambda pages, request, name: go.wait(PATIENCE) and web.Response(name))
    asking = [connect(port, WHOLE.replace(b"static/icon.svg", b"")) for _ in range(2)]
    time.sleep(0.3)
    assert is_closed(connect(port, WHOLE), PATIENCE)
    go.set()
    assert [one.recv(1 << 20)[:12] for one in asking] == [b"HTTP/1.1 200"] * 2


def test_what_is_no_request_fills_no_log(port, capfd):
    for _ in range(20):
        broken = connect(port, b"\0\1\2\r\n\r\n")
        assert broken.recv(1 << 16).startswith(b"HTTP/1.1 400")
    assert capfd.readouterr() == ("", "")
