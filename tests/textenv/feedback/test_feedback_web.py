"""The rating server without a browser: its answers, and the facts that it hides from raters."""

import json
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.helpers.browsing import Server
from textenv.feedback.store import FeedbackStore

pytest.importorskip("starlette", reason='needs starlette: pip install "textenv[feedback]"')
pytest.importorskip("httpx2", reason="needs httpx2, which starlette's test client uses")


from tests.helpers.feedback import visit
from textenv.feedback import web
from textenv.feedback.words import _WORDS, words


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "answers.db", seed=0) as opened:
        yield opened


def fill(store):
    store.add("score this", ["x", "y"], models=["secret-model"] * 2, run="secret-run", gold=True)
    store.add("compare this", ["x", "y"], kind="compare", models="secret-model")
    store.add("rank this", ["x", "y", "z"], kind="rank", models="secret-model")


VALUES = {"score": [4, 2], "compare": "b", "rank": [2, 0, 1]}


def rate_all(client):
    state = client.post("/api/next", json={}).json()
    while (item := state["item"]) is not None:
        body = {"showing": item["showing"], "kind": item["kind"], "value": VALUES[item["kind"]], "seconds": 1.5}
        state = client.post("/api/answer", json=body).json()
    return state


def test_all_kinds_are_answered_and_stored(store):
    fill(store)
    client = visit(store)
    state = rate_all(client)
    assert state == {"item": None, "progress": {"done": 4, "skipped": 0, "left": 0}, "last": 4}
    score, compare, rank, again = answers = store.answers()
    assert [answer.kind for answer in answers] == ["score", "compare", "rank", "score"]
    assert [answer.repeat for answer in answers] == [0, 0, 0, 1]
    assert [score.value[index] for index in score.order] == [4.0, 2.0]
    assert compare.value == compare.order[1]
    assert rank.value == tuple(rank.order[shown] for shown in (2, 0, 1))
    assert again.order == score.order[::-1] and again.value == score.value[::-1]
    assert {(answer.rater, answer.seconds) for answer in answers} == {("ann", 1.5)}


def test_the_page_learns_neither_models_nor_repeats(store):
    fill(store)
    client = visit(store)
    item = client.post("/api/next", json={}).json()["item"]
    assert set(item) == {"showing", "kind", "prompt", "messages", "completions", "scale"}
    rate_all(client)
    everything = [client.get(path).text for path in ("/", "/history", "/api/history")]
    assert not any("secret" in text for text in everything)


def test_reload_skip_and_undo(store):
    fill(store)
    client = visit(store)
    first = client.post("/api/next", json={}).json()
    assert client.post("/api/next", json={}).json() == first
    number = first["item"]["showing"]
    second = client.post("/api/answer", json={"showing": number, "kind": "skip"}).json()
    assert second["progress"] == {"done": 0, "skipped": 1, "left": 2}
    assert (first["last"], second["last"]) == (None, 1)
    assert client.post("/api/undo", json={"answer": 1}).json() == first
    assert [answer.kind for answer in store.answers()] == []


def test_an_undo_sent_again_takes_back_nothing_more(store):
    fill(store)
    client = visit(store)
    state = client.post("/api/next", json={}).json()
    for _ in range(2):
        body = {"showing": state["item"]["showing"], "kind": "skip"}
        state = client.post("/api/answer", json=body).json()
    undone = [client.post("/api/undo", json={"answer": state["last"]}).json() for _ in range(3)]
    assert undone[0] == undone[1] == undone[2] and undone[0]["last"] == 1
    assert [answer.id for answer in store.answers()] == [1]
    assert client.post("/api/undo", json={"answer": 1}).json()["last"] is None
    assert store.answers() == []


@pytest.mark.parametrize("body", [{}, {"answer": 0}, {"answer": 9}, {"answer": 2}, {"answer": [1]}, {"answer": "1"}])
def test_undo_of_a_number_that_is_no_answer_of_the_rater_is_refused(store, body):
    store.add("p", ["x"], raters=2)
    for name in ("ann", "bob"):
        store.score(store.next(name), [1])
    response = visit(store).post("/api/undo", json=body)
    assert response.status_code == 400 and "Expected" in response.json()["error"]
    assert len(store.answers()) == 2


@pytest.mark.parametrize("kind", ["score", "compare", "rank", "skip"])
@pytest.mark.parametrize("value", [[[1], [2]], {"a": 1}, [{"a": 1}, None], [1e999, 2], "a" * 999, True, [[]] * 2])
def test_values_of_another_shape_are_refused(store, kind, value):
    store.add("p", ["x", "y"], kind="score" if kind == "skip" else kind)
    client = visit(store)
    number = client.post("/api/next", json={}).json()["item"]["showing"]
    text = json.dumps({"showing": number, "kind": kind, "value": value})
    response = client.post("/api/answer", content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "Expected" in response.json()["error"]
    assert store.answers() == []


def test_kinds_are_kept_apart(store):
    fill(store)
    client = visit(store, kind="rank")
    state = client.post("/api/next", json={}).json()
    assert state["item"]["kind"] == "rank" and state["progress"]["left"] == 1


def test_raters_are_kept_apart(store):
    store.add("p", ["x", "y"], kind="compare", raters=2)
    ann, bob = visit(store, "ann"), visit(store, "李 / bob;")
    item = ann.post("/api/next", json={}).json()["item"]
    theirs = bob.post("/api/answer", json={"showing": item["showing"], "kind": "compare", "value": "a"})
    assert theirs.status_code == 400 and "Expected the number of something" in theirs.json()["error"]
    rate_all(bob), rate_all(ann)
    assert [answer.rater for answer in store.answers()] == ["李 / bob;", "ann"]


def test_the_raters_name_is_asked_and_can_be_forgotten(store):
    client = visit(store, rater="")
    assert "name.js" in client.get("/").text and "name.js" in client.get("/history").text
    assert client.post("/api/next", json={}).status_code == 400
    for bad in ("", " ", "x" * 65, "a\nb", 5):
        assert client.post("/api/rater", json={"rater": bad}).status_code == 400
    client.post("/api/rater", json={"rater": " ann "})
    assert "rate.js" in client.get("/").text
    client.post("/api/rater", json={})
    assert "name.js" in client.get("/").text


@pytest.mark.parametrize(
    "body",
    [
        {"showing": 1, "kind": "rank", "value": [0, 0, 1]},
        {"showing": 1, "kind": "rank", "value": [0, 1]},
        {"showing": 1, "kind": "rank", "value": [0, 1, 3]},
        {"showing": 1, "kind": "rank", "value": None},
        {"showing": 1, "kind": "rank", "value": "012"},
        {"showing": 1, "kind": "rank", "value": [0, 1, 2], "seconds": -1},
        {"showing": 1, "kind": "rank", "value": [0, 1, 2], "seconds": "1"},
        {"showing": 1, "kind": "score", "value": [1, 1, 1]},
        {"showing": 1, "kind": "compare", "value": {"a": 1}},
        {"showing": 1, "kind": "undo"},
        {"showing": 1},
        {"showing": 2, "kind": "skip"},
        {"showing": True, "kind": "skip"},
        {"showing": 2**70, "kind": "skip"},
        {"showing": 1, "kind": ["rank"], "value": [0, 1, 2]},
        {"showing": 1, "kind": {}, "value": [0, 1, 2]},
        {"showing": 1, "kind": "rank", "value": [0, 1, 2], "seconds": [1]},
        {"showing": 1, "kind": "rank", "value": [0, 1, 2], "models": ["m"]},
        {"showing": "1", "kind": "skip"},
        [],
    ],
)
def test_invalid_answers_are_refused(store, body):
    store.add("p", ["x", "y", "z"], kind="rank")
    client = visit(store)
    client.post("/api/next", json={})
    response = client.post("/api/answer", json=body)
    assert response.status_code == 400 and "Expected" in response.json()["error"]
    assert store.answers() == []


@pytest.mark.parametrize("text", ["", "{", "[" * 9000, '{"showing": ' + "9" * 9000 + "}", "\xff"])
def test_bodies_that_are_no_json_are_refused(store, text):
    client = visit(store)
    response = client.post("/api/answer", content=text.encode("latin-1"), headers={"content-type": "application/json"})
    assert response.status_code == 400 and "Expected" in response.json()["error"]


def test_pages_hold_no_inline_script_or_style_and_nothing_from_elsewhere(store):
    client = visit(store)
    for path in ("/", "/history"):
        page = client.get(path).text
        assert "<style" not in page and " style=" not in page and " on" + "click=" not in page
        assert "http" not in page.replace("HTTP", "") and "//" not in page
    for file in sorted((web.FOLDER / "static").iterdir()):
        text = file.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "https:" not in text, file


def test_markup_in_names_is_text(store):
    client = visit(store, "<script>alert(1)</script>'\"")
    assert "<script>alert" not in client.get("/").text and "<script>alert" not in client.get("/history").text


def test_history_filters_and_pages(store, monkeypatch):
    for number in range(5):
        store.add(f"Prompt {number}", ["x", "y"], kind="compare", raters=2)
    store.add("other", ["x"])
    ann, bob = visit(store, "ann"), visit(store, "bob")
    rate_one = {"compare": "a", "score": [3]}
    for client in (ann, bob):
        state = client.post("/api/next", json={}).json()
        while (item := state["item"]) is not None:
            body = {"showing": item["showing"], "kind": item["kind"], "value": rate_one[item["kind"]]}
            state = client.post("/api/answer", json=body).json()
    every = ann.get("/api/history").json()
    assert (every["n"], every["raters"], every["me"]) == (11, ["ann", "bob"], "ann")
    assert [row["id"] for row in every["rows"]] == list(range(11, 0, -1))
    assert every["agreement"]["compare"]["units"] == 5
    assert ann.get("/api/history?rater=bob&kind=compare").json()["n"] == 5
    assert ann.get("/api/history?kind=score&rater=bob").json()["n"] == 0
    assert [row["prompt"] for row in ann.get("/api/history?search=pROMPT 3").json()["rows"]] == ["Prompt 3"] * 2
    monkeypatch.setattr(web, "PAGE", 4)
    assert [row["id"] for row in ann.get("/api/history?start=8").json()["rows"]] == [3, 2, 1]
    for start in ("x", "-1", "9" * 5000, "١"):
        refused = ann.get("/api/history", params={"start": start})
        assert refused.status_code == 400 and "Expected `start` to be a whole number" in refused.json()["error"]


def test_unknown_agreement_is_null(store):
    """NaN is not valid JSON: a browser would refuse the whole history."""
    store.add("p", ["x"], raters=2)
    for name in ("ann", "bob"):
        store.score(store.next(name), [3])
    assert visit(store).get("/api/history").json()["agreement"]["score"] == {"alpha": None, "units": 1, "raters": 2}


def test_downloads(store):
    fill(store)
    client = visit(store)
    rate_all(client)
    response = client.get("/export?form=pairs&kind=rank")
    assert response.headers["content-disposition"] == 'attachment; filename="pairs.jsonl"'
    rows = [json.loads(line) for line in response.text.splitlines()]
    assert len(rows) == 3 and {row["prompt"] for row in rows} == {"rank this"}
    assert client.get("/export?form=scores&rater=bob").text == ""
    assert client.get("/export?form=../../x").status_code == 400


def test_languages_and_themes(store):
    client = visit(store)
    assert 'lang="en"' in client.get("/").text
    chinese = client.get("/", headers={"accept-language": "zh-CN,zh;q=0.9"}).text
    assert 'lang="zh"' in chinese and words("zh")["skip"] in chinese
    client.get("/?language=zh"), client.get("/?theme=dark")
    assert 'lang="zh" data-theme="dark"' in client.get("/").text
    client.get("/?language=en"), client.get("/?theme=<script>")
    assert 'lang="en" data-theme="dark"' in client.get("/").text


def test_every_word_has_both_languages():
    for name, texts in _WORDS.items():
        assert len(texts) == 2 and all(texts), name
        assert not hasattr(dict, name), name  # Jinja would find the dict's method first
        marks = [sorted(part.split("}")[0] for part in text.split("{")[1:]) for text in texts]
        assert marks[0] == marks[1], name


def test_a_locked_store_is_reported(store):
    store.add("p", ["x"])
    with FeedbackStore(store.path, timeout=0.05) as impatient:
        client = visit(impatient)
        with store._db.writing():
            response = client.post("/api/next", json={})
    assert response.status_code == 503 and "database is locked" in response.json()["error"]


def test_another_server_continues_after_a_killed_one(store):
    """The server runs in its own process, and its files and connections are real, unlike the test client's."""
    store.add("p", ["x"])
    server = Server(store.path)
    here = {"origin": server.url.rstrip("/"), "content-type": "application/json", "cookie": "rater=ann"}

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(server.url + path, data, here)) as response:
            return response.read()

    assert ask("static/rate.js") == (web.FOLDER / "static" / "rate.js").read_bytes()
    shown = json.loads(ask("api/next", {}))["item"]
    server.kill()
    with pytest.raises(URLError):
        ask("api/next", {})
    server = Server(store.path, json.dumps({"port": server.port}))
    assert json.loads(ask("api/next", {}))["item"] == shown
    ask("api/answer", {"showing": shown["showing"], "kind": "score", "value": [5]})
    server.kill()
    assert [answer.value for answer in store.answers()] == [(5.0,)]
