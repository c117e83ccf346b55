"""`HTTPJudge` and `ChatJudge` with a test server that delays, fails, refuses and answers rubbish."""

import asyncio
import copy
import json
import pickle
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.helpers.rewards import preds_of, rows, scores
from textenv import Prompt, RewardError
from textenv.rewards import DROPPED, ChatJudge, HTTPJudge, read_reward
from textenv.rewards.http_judge import _seconds

SECRET = "sk-very-secret-7"
QUICK = {"backoff": 0.0}


class Handler(BaseHTTPRequestHandler):
    """A server that obeys the completion: "fail2" gets 503 twice, "busy" 429 once, "slow" waits, "rubbish" no JSON."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        with server.lock:
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"] if "messages" in body else body["completion"]
            with server.lock:
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.counts[text] += 1
                n = server.counts[text]
            self.answer(text, n)
        finally:
            with server.lock:
                server.running -= 1

    def answer(self, text, n):
        time.sleep(self.server.delay)
        score = json.dumps({"result": [{"score": len(text)}], "parts": {"a": 1, "b": 2}, "score": len(text)})
        if "messages" in self.server.bodies[-1]:
            score = json.dumps({"choices": [{"message": {"content": self.server.reply[min(n, 2) - 1]}}]})
        if text.startswith("fail") and n <= int(text[4:]):
            return self.write(503, "try later")
        if text.startswith("busy") and n == 1:
            return self.write(429, "too many", {"Retry-After": self.server.retry_after})
        if text.startswith("slow"):
            self.server.released.wait(10)
        if text == "refused":
            return self.write(422, f"no {self.headers['Authorization']}")
        if text == "moved":
            return self.write(307, "", {"Location": "http://elsewhere.example/score"})
        if text == "rubbish":
            return self.write(200, f"<html>{self.headers['Authorization']}")
        if text == "nokey":
            return self.write(200, '{"other": 1}')
        if text == "notanumber":
            return self.write(200, '{"score": NaN}')
        if text == "huge":
            return self.write(200, " " * 3_000_000 + score)
        if text == "cut":
            self.close_connection = True
            return self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
        return self.write(200, score)

    def write(self, status, text, headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(text.encode())
        except OSError:  # the client has hung up
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    http_server.lock, http_server.released = threading.Lock(), threading.Event()
    http_server.running, http_server.most, http_server.delay, http_server.retry_after = 0, 0, 0.0, "0"
    http_server.bodies, http_server.headers, http_server.counts = [], [], Counter()
    http_server.url = f"http://127.0.0.1:{http_server.server_address[1]}/score"
    thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
    thread.start()
    yield http_server
    http_server.released.set()
    http_server.shutdown()
    thread.join()
    http_server.server_close()


def test_requests_and_answers_by_hand(server):
    row = {"prompt": "p", "label": 3, "other": object()}
    prompts, preds, dones = rows(["ab", "cde"], prompts=["p", "q"], references=["r"], row=row)
    assert HTTPJudge(server.url, row_columns=["label"]).score(prompts, preds, dones) == [2.0, 3.0]
    assert sorted(server.bodies, key=lambda body: body["prompt"]) == [
        {"prompt": "p", "completion": "ab", "references": ["r"], "row": {"label": 3}},
        {"prompt": "q", "completion": "cde", "references": ["r"], "row": {"label": 3}},
    ]
    assert all("Authorization" not in headers for headers in server.headers)


def test_key_paths(server):
    assert scores(HTTPJudge(server.url, key="result.0.score"), ["abc"]) == [3.0]
    assert HTTPJudge(server.url, key="parts")(Prompt("p"), preds_of("abc"), True) == {"a": 1.0, "b": 2.0}
    with pytest.raises(RewardError, match=r"Expected 'result.1.score' in the answer, got \{'result'"):
        scores(HTTPJudge(server.url, key="result.1.score", **QUICK), ["abc"])


@pytest.mark.slow
def test_the_server_sees_no_more_rows_at_a_time_than_asked_for(server):
    server.delay = 0.03
    assert scores(HTTPJudge(server.url, concurrency=3), [f"{i:02}" for i in range(12)]) == [2.0] * 12
    assert server.most == 3
    server.most = 0
    scores(HTTPJudge(server.url, concurrency=12), [f"{i:03}" for i in range(12)])
    assert server.most > 3


def test_5xx_and_429_are_asked_again_and_4xx_are_not(server):
    reward = HTTPJudge(server.url, retries=2, on_failure=-1.0, **QUICK)
    with pytest.warns(UserWarning, match="status 503: 'try later'"):
        assert scores(reward, ["fail2", "fail3", "busy", "refused", "moved"]) == [5.0, -1.0, 4.0, -1.0, -1.0]
    assert server.counts == {"fail2": 3, "fail3": 3, "busy": 2, "refused": 1, "moved": 1}
    assert reward.n_failed == 3


def test_retry_after_is_respected(server, monkeypatch):
    slept, sleep = [], asyncio.sleep

    async def note(seconds):
        slept.append(seconds)
        await sleep(0)

    server.retry_after = "17"
    with monkeypatch.context() as patch:
        patch.setattr("textenv.rewards.asynchronous.asyncio.sleep", note)
        assert scores(HTTPJudge(server.url, retries=1, **QUICK), ["busy"]) == [4.0]
    assert 17.0 in slept
    server.retry_after = "7200"
    with pytest.raises(RewardError, match="status 429: 'too many'; to be asked again in 7200 s"):
        scores(HTTPJudge(server.url, **QUICK), ["busy2"])


def test_retry_after_by_date_and_rubbish(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    assert _seconds(formatdate(1_700_000_060, usegmt=True)) == 60
    assert [_seconds(text) for text in ("12", "", "soon", formatdate(0, usegmt=True), "-3")] == [12.0, 0, 0, 0, 0]


def test_the_time_limit(server):
    reward = HTTPJudge(server.url, time_limit=0.1, retries=1, on_failure="drop", **QUICK)
    with pytest.warns(UserWarning, match=r"no answer within 0\.1 s"):
        assert list(reward.score(*rows(["slow", "ab"]))) == [DROPPED, 2.0]
    assert server.counts["slow"] == 2 and not server.released.is_set()  # the server is still waiting


@pytest.mark.parametrize(
    ("text", "words", "n_asked"),
    [
        ("rubbish", r"Expected JSON, got '<html>", 2),
        ("nokey", r"Expected 'score' in the answer, got \{'other': 1\}", 2),
        ("notanumber", "Expected a reward to be a finite number, got nan", 2),
        ("cut", "RemoteProtocolError", 2),
        ("huge", "Expected an answer of at most max_bytes=1000000, got more", 1),
        ("moved", "status 307 to 'http://elsewhere.example/score'", 1),
        ("refused", "status 422: 'no None'", 1),
    ],
)
def test_an_answer_without_score_fails_its_row_alone(server, text, words, n_asked):
    with pytest.raises(RewardError, match=f"has no score of 1 of 2 rows(.|\n)*text '{text}': {words}"):
        scores(HTTPJudge(server.url, retries=1, **QUICK), [text, "ab"])
    assert server.counts[text] == n_asked


def test_no_server_is_a_failure_with_a_cause():
    reward = HTTPJudge("http://127.0.0.1:9/score", retries=1, **QUICK)
    with pytest.raises(RewardError, match="ConnectError"):
        scores(reward, ["a"])


def test_rows_that_cannot_be_sent(server):
    reward = HTTPJudge(server.url, row_columns=["label"])
    with pytest.raises(RewardError, match=r"Expected a row with the columns \['label'\], got \['prompt'\]"):
        scores(reward, ["a"])
    with pytest.raises(RewardError, match="Expected a row that can be written as JSON"):
        scores(reward, ["a"], row={"label": object()})
    assert server.bodies == []


# A chat model


def test_a_chat_model_is_asked_and_its_mark_read(server):
    server.reply = ["8", "9"]
    reward = read_reward(
        {"name": "chat", "url": server.url, "model": "m", "question": "{prompt}|{completion}|{references}"}
    )
    assert scores(reward, ["a{b}"], references=["r", "s"]) == [0.8]
    content = "p |a{b}|r\ns"
    assert server.bodies == [{"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0.0}]


def test_a_reply_without_a_mark_is_asked_for_again(server):
    server.reply = ["I would say 8/10.", "7.5"]
    reward = ChatJudge(server.url, model="m", **QUICK)
    assert scores(reward, ["a"]) == [0.75] and sum(server.counts.values()) == 2
    server.reply = ["11", "-1"]
    with pytest.raises(RewardError, match="Expected a mark from 0 to 10, got '-1'"):
        scores(ChatJudge(server.url, model="m", retries=1, **QUICK), ["b"])
    reward = ChatJudge(server.url, model="m", pattern=r"(\d+)/10", low=6, retries=0)
    server.reply = ["1 of it is bad: 8/10."] * 2
    assert scores(reward, ["c"]) == [0.5]
    for options in ({"low": 10.0}, {"pattern": "8"}):
        with pytest.raises(ValueError, match="low < high and a `pattern` with a group"):
            ChatJudge(server.url, model="m", **options)
    for question in ('Rate {completion} as {"mark": 3}', "Rate {answer}", "Rate {"):
        with pytest.raises(ValueError, match="Expected a `question` with"):
            ChatJudge(server.url, model="m", question=question)


# The key


def test_the_key_is_sent_and_kept_nowhere(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET + "\n")
    reward = HTTPJudge(server.url, api_key_variable="JUDGE_KEY", retries=0, on_failure="raise")
    assert scores(reward, ["ab"]) == [2.0]
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    with pytest.raises(RewardError) as error:
        scores(reward, ["refused", "rubbish"])
    assert SECRET not in str(error.value) and "Bearer ***" in str(error.value)
    assert SECRET not in repr(reward) + repr(vars(reward)) + repr(error.value.__cause__)
    assert SECRET.encode() not in pickle.dumps(reward)


@pytest.mark.parametrize("value", [None, "", "sk-a\nb", "sk-ä"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="environment variable 'JUDGE_KEY' to hold a key") as error:
        HTTPJudge("https://judge.example", api_key_variable="JUDGE_KEY")
    assert "sk-" not in str(error.value)


# Options, names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "ftp://judge.example/a"}, "http:// or https:// and a host, got 'ftp:"),
        ({"url": "file:///etc/passwd"}, "http:// or https://"),
        ({"url": "judge.example"}, "http:// or https://"),
        ({"url": "https://user:pass@judge.example"}, "without a user or password"),
        ({"url": "https://judge.example", "key": "a..b"}, "a `key` as 'a.b'"),
        ({"url": "https://judge.example", "max_bytes": 0}, "`max_bytes` >= 1"),
        ({"url": "https://judge.example", "row_columns": "label"}, "list of names, got the text 'label'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        HTTPJudge(**options)


def test_http_judges_have_a_name_pickle_and_copy(server):
    text = json.dumps({"name": "http", "url": server.url, "key": "result.0.score", "on_failure": "drop"})
    reward = read_reward(json.loads(text))
    for twin in (reward, pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
        assert twin == reward and scores(twin, ["abc"]) == [3.0]
