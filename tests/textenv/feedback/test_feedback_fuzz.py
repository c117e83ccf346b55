"""Thousands of requests that no page sends: each is answered, without a server error or a lost answer."""

import json
import random
from urllib.parse import quote

import pytest

from textenv.feedback.store import FeedbackStore

pytest.importorskip("starlette", reason="needs starlette: pip install textenv[feedback]")
pytest.importorskip("httpx2", reason="needs httpx2, which starlette's test client uses")
pytestmark = pytest.mark.slow

from tests.helpers.feedback import pair, visit  # noqa: E402

N = 1500
PATHS = ("/api/next", "/api/answer", "/api/answer", "/api/answer", "/api/undo", "/api/rater")
GETS = ("/", "/history", "/api/history", "/export", "/static/rate.js", "/static/../web.py", "/static/%00", "/nowhere")
ATOMS = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, 1e999, -1e999, float("nan")),
    *(
        "",
        "a",
        "b",
        "tie",
        "both_bad",
        "score",
        "compare",
        "rank",
        "skip",
        "undo",
        "1",
        "ann",
        "\0",
        "\ud800",
        "x" * 3000,
    ),
)
NAMES = ("showing", "kind", "value", "seconds", "rater", "answer", "", "__class__", "\ud800")
RAW = (b"", b"{", b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b"nan", b"9" * 5000, b"x" * 20_000, b'{"showing": 1e400}')
QUERIES = (
    "",
    "0",
    "-1",
    "1e9",
    "9" * 5000,
    "x",
    "pairs",
    "rankings",
    "scores",
    "compare",
    "ann",
    "\0",
    "%",
    "\udcff",
    "[",
)


def value(draw, depth=0):
    """Return a random JSON value, most often a flat one."""
    kind = draw.random()
    if depth > 2 or kind < 0.6:
        return draw.choice(ATOMS)
    if kind < 0.85:
        return [value(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    return {draw.choice(NAMES): value(draw, depth + 1) for _ in range(draw.randint(0, 3))}


def body(draw, path, state):
    """Return a body for a path: nonsense, or the page's own body with up to two values replaced."""
    if draw.random() < 0.1:
        return draw.choice(RAW)
    right = {
        "/api/next": {},
        "/api/rater": {"rater": draw.choice(["ann", "bob"])},
        "/api/undo": {"answer": state.get("last") or 1},
        "/api/answer": good(draw, state.get("item")),
    }[path]
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        right[draw.choice([*right, *NAMES])] = value(draw)
    return json.dumps(right if draw.random() < 0.9 else value(draw)).encode()


def good(draw, item):
    if item is None or draw.random() < 0.1:
        return {"showing": 1, "kind": "skip", "value": None, "seconds": 1}
    n = len(item["completions"])
    values = {
        "score": [draw.randint(1, 5) for _ in range(n)],
        "compare": draw.choice(["a", "b", "tie", "both_bad"]),
        "rank": draw.sample(range(n), n),
    }
    return {"showing": item["showing"], "kind": item["kind"], "value": values[item["kind"]], "seconds": 1.5}


@pytest.mark.parametrize("seed", range(2))
def test_no_request_causes_a_server_error(seed, tmp_path):
    draw, statuses = random.Random(seed), {}
    with FeedbackStore(tmp_path / "answers.db", seed=seed) as store:
        store._db.execute("PRAGMA synchronous=OFF")
        for number in range(N // 4):
            store.add("p", ["x"] * draw.randint(1, 8), gold=number % 5 == 0)
            pair(store, raters=2)
            store.add("p", ["x"] * draw.randint(2, 8), kind="rank")
        client, state = visit(store), {}
        for _ in range(N):
            before = store.last_answer("ann"), store.last_answer("bob")
            if draw.random() < 0.15:
                name = draw.choice(["start", "kind", "rater", "form", "search", "theme"])
                text = quote(draw.choice(QUERIES).encode("utf-8", "surrogateescape"))  # some are invalid UTF-8
                got = client.get(f"{draw.choice(GETS)}?{name}={text}")
            else:
                path = draw.choice(PATHS)
                got = client.post(path, content=body(draw, path, state), headers={"content-type": "application/json"})
                if got.status_code == 200 and path != "/api/rater":
                    state = got.json()
            assert got.status_code < 500, (got.request, got.text)
            if got.status_code >= 400:
                assert (store.last_answer("ann"), store.last_answer("bob")) == before
            if got.status_code == 400:
                assert "Expected" in got.json()["error"], got.text
            if not client.cookies.get("rater"):
                client.post("/api/rater", json={"rater": "ann"})
            statuses[got.status_code] = statuses.get(got.status_code, 0) + 1
        answers = store.answers()
    # Many requests were refused, and many were valid.
    assert statuses[400] > N / 5 and statuses[200] > N / 5 and len(answers) > N / 30, (statuses, len(answers))
