"""The rating server's guard: it refuses foreign hosts, other sites, missing tokens and large bodies."""

import http.client
import json
import socket
from urllib.parse import quote

import pytest

from tests.helpers.browsing import Server
from textenv.feedback.store import FeedbackStore

pytest.importorskip("starlette", reason='needs starlette: pip install "textenv[feedback]"')
pytest.importorskip("httpx2", reason="needs httpx2, which starlette's test client uses")

from starlette.testclient import TestClient

from tests.helpers.feedback import HERE, visit
from textenv.feedback import web
from textenv.feedback.guard import MAX_BODY

TOKEN = "a-token-of-enough-characters"


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "answers.db", seed=0) as opened:
        yield opened


def test_long_bodies_are_refused_and_not_read(store):
    client = visit(store)
    headers = {"content-type": "application/json"}
    fits = json.dumps({"rater": "ann"}).ljust(MAX_BODY)
    assert client.post("/api/rater", content=fits, headers=headers).status_code == 200
    assert client.post("/api/rater", content=fits + " ", headers=headers).status_code == 413
    read = []

    def endless():
        while len(read) < 1000:
            read.append(1)
            yield b" " * 8192

    assert client.post("/api/rater", content=endless(), headers=headers).status_code == 413


@pytest.mark.parametrize(
    ("host", "local", "network"),
    [
        ("127.0.0.1:8000", 200, 200),
        ("localhost", 200, 200),
        ("LOCALHOST:1", 200, 200),
        ("[::1]:8000", 200, 200),
        ("192.168.1.7:8000", 403, 200),
        ("evil.example:8000", 403, 403),
        ("127.0.0.1.evil.example", 403, 403),
        ("localhost@evil.example", 403, 403),
        ("[::1", 403, 403),
        ("", 403, 403),
    ],
)
def test_foreign_hosts_are_refused(store, host, local, network):
    assert visit(store).get("/", headers={"host": host}).status_code == local
    assert visit(store, any_address=True).get("/", headers={"host": host}).status_code == network


def test_host_names_can_be_set(store):
    client = visit(store, names=["rating.example"])
    assert client.get("/", headers={"host": "Rating.Example:8000"}).status_code == 200
    assert client.get("/", headers={"host": "localhost"}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": HERE}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "none"}, 403),
        ({"origin": HERE, "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://evil.example", "sec-fetch-site": "same-origin"}, 403),
    ],
)
def test_writing_from_other_sites_is_refused(store, headers, status):
    client = TestClient(web.make_app(store), base_url=HERE)
    assert client.post("/api/rater", json={"rater": "ann"}, headers=headers).status_code == status


def test_requests_that_a_form_of_another_site_could_send_are_refused(store):
    client = visit(store)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post("/api/rater", content='{"rater": "ann"}', headers={"content-type": kind})
        assert response.status_code == 415
    for path in ("/api/next", "/api/answer", "/api/undo", "/api/rater"):
        assert client.get(path).status_code == 405


def test_the_token_leaves_the_url_for_a_cookie(store):
    client = visit(store, rater="", token=TOKEN)
    assert client.get("/").status_code == 401
    response = client.get(f"/history?token={TOKEN}&language=zh")
    assert (response.status_code, response.headers["location"]) == (303, "/history?language=zh")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie.split("=")[0]
    assert client.get("/").status_code == 200
    assert TOKEN not in client.get("/").text


@pytest.mark.parametrize("token", ["wrong", "", TOKEN[:-1], TOKEN + "a", "é"])
def test_wrong_tokens_are_refused(store, token):
    store.add("p", ["x"])
    client = visit(store, rater="", token=TOKEN)
    assert client.get("/", params={"token": token}).status_code == 401
    client.cookies.set(web.Guard(None, (), False, TOKEN, "/static/", None).cookie, quote(token))
    for path in ("/", "/history", "/api/history", "/export?form=pairs", "/nothing"):
        assert client.get(path).status_code == 401
    for path in ("/api/next", "/api/answer", "/api/undo", "/api/rater", f"/api/next?token={TOKEN}"):
        response = client.post(path, json={})
        assert response.status_code == 401 and response.json() == {"error": "Expected the token."}
    assert client.get("/static/style.css").status_code == 200


def test_the_redirect_stays_on_the_server(store):
    client = visit(store, rater="", token=TOKEN)
    assert client.get(f"{HERE}//evil.example/?token={TOKEN}").headers["location"] == "/evil.example/"


def test_every_answer_has_the_headers(store):
    client = visit(store)
    refused = client.get("/", headers={"host": "evil.example"})
    for response in (client.get("/"), client.get("/static/rate.js"), client.get("/nothing"), refused):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"


def test_other_addresses_need_a_token(store):
    with pytest.raises(ValueError, match=r"Expected a `token` to listen on 0\.0\.0\.0"):
        web.serve(store, host="0.0.0.0")
    for token in ("short", "has spaces in it, so it would need quotes", ""):
        with pytest.raises(ValueError, match="Expected a `token` of"):
            web.serve(store, token=token)


def test_an_address_in_use_is_an_error(store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="in use"):
            web.serve(store, port=taken.getsockname()[1])


def test_the_real_server_on_every_address_asks_for_the_token(store):
    server = Server(store.path, json.dumps({"host": "0.0.0.0", "token": TOKEN}))
    ours = socket.gethostname()
    assert server.url == f"http://{ours}:{server.port}/?token={TOKEN}"

    def status(host, query=""):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", f"/{query}", headers={"host": host})
        return connection.getresponse().status

    try:
        query = f"?token={TOKEN}"
        assert [status(host) for host in (ours, "10.0.0.1", "evil.example")] == [401, 401, 403]
        assert [status(host, query) for host in (ours, "10.0.0.1", "evil.example")] == [303, 303, 403]
    finally:
        server.kill()
