"""Questions about the answers of a chat: people read messages, and what is trained on stays the rendered text."""

import io
import json
import sqlite3

import pytest
from rich.console import Console

from agents.supervised.feedback_data import read_feedback
from textenv import CharTokenizer, Preds, Prompt
from textenv.feedback.database import VERSION
from textenv.feedback.exchange import export, rows_of
from textenv.feedback.records import Record
from textenv.feedback.store import FeedbackStore
from textenv.feedback.terminal import RatingTerminal
from textenv.rewards import BatchReward, HumanReward

RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it good?"})
TEXTS = {"score": ["Yes."], "compare": ["Yes.", "No."], "rank": ["Yes.", "No.", "Perhaps."]}
BAD = '<script>pwned = 1</script><img src=x onerror="pwned = 1">{{ 7 * 7 }}'


def answer_all(store, rater="ann"):
    """Give the best score to the text that was added first, or choose it, or rank texts as they were added."""
    while (item := store.next(rater)) is not None:
        if item.kind == "compare":
            store.choose(item, "ab"[item.order.index(0)])
        elif item.kind == "rank":
            store.rank(item, [item.order.index(index) for index in range(len(item.order))])
        else:
            store.score(item, [5 - index for index in item.order])


def test_the_store_keeps_messages_beside_the_text(store, path):
    named = [{**message, "name": "bob", "tool": object()} for message in MESSAGES]  # what people do not read
    store.add(RENDERED, ["Yes.", "No."], "compare", messages=named)
    store.add("It was", [" good."])
    shown = store.next("ann")
    assert (shown.prompt, shown.messages) == (RENDERED, MESSAGES) and store.next("ann") == shown
    assert store.showing(shown.showing, "ann") == shown
    answer_all(store)
    store.record([Record("score", RENDERED, ["Yes."], [3], "bob", messages=list(MESSAGES))])
    with FeedbackStore(path) as again:
        assert [answer.prompt for answer in again.answers()] == [RENDERED, "It was", RENDERED]
        assert [answer.messages for answer in again.answers()] == [MESSAGES, None, MESSAGES]
        assert again.undo("ann").messages is None and again.undo("ann").messages == MESSAGES


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "a list of messages"),
        ("user: hi", "a list of messages"),
        ([{"role": "user"}], "with the texts 'role' and 'content'"),
        ([{"role": "user", "content": ["a part"]}], "with the texts 'role' and 'content'"),
        ([*MESSAGES, "hi"], "a list of messages"),
        ([{"role": "user", "content": "\ud800"}], "UTF-8"),
    ],
)
def test_what_are_no_messages_is_refused(store, messages, said):
    with pytest.raises(ValueError, match=f"Expected .*{said}.*, got "):
        store.add(RENDERED, ["Yes."], messages=messages)
    with pytest.raises(ValueError, match=f"Record 1: Expected .*{said}.*, got "):
        store.record([Record("score", RENDERED, ["Yes."], [3], "bob", messages=messages)])
    assert store.next("ann") is None and store.answers() == []


def make_older(path):
    """Turn a closed store into one of version 2, which had no column for messages."""
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE items DROP COLUMN messages")
        db.execute("PRAGMA user_version=2")
    db.close()


def test_a_store_of_version_2_opens_and_keeps_all(path):
    with FeedbackStore(path, seed=0) as store:
        for prompt in (RENDERED, "It was", "open"):
            store.add(prompt, ["x", "y"], "compare", raters=2)
        store.choose(store.next("ann"), "a"), store.skip(store.next("ann"))
        before, shown, progress = store.answers(), store.next("ann"), store.progress("ann")
    make_older(path)
    with FeedbackStore(path) as store, FeedbackStore(path) as other:  # the second one finds nothing to change
        assert store.answers() == before and store.progress("ann") == progress
        assert other.next("ann") == shown and shown.messages is None
        other.choose(shown, "b")
        other.add(RENDERED, ["x"], messages=MESSAGES)
        assert store.next("ann").messages == MESSAGES
        assert store._db._header("user_version") == VERSION == 3


def terminal(store, lines=()):
    console = Console(file=io.StringIO(), width=60, highlight=False)
    rest = iter(lines)
    RatingTerminal(store, "ann", console=console, read=lambda prompt: next(rest, "q")).run()
    return console.file.getvalue()


@pytest.mark.parametrize("kind", TEXTS)
def test_the_terminal_shows_roles_and_texts(store, kind):
    store.add(RENDERED, TEXTS[kind], kind, messages=MESSAGES)
    shown = terminal(store)
    lines = [line.strip("│").rstrip() for line in shown.splitlines()]
    assert lines[1:5] == [" system", "   Be brief.", " user", "   Is it good?"]
    assert sorted(line.strip() for line in lines if line.strip() in TEXTS[kind]) == sorted(TEXTS[kind])
    assert "im_start" not in shown and shown.count("╭") == 1 + len(TEXTS[kind])


def test_a_message_in_the_terminal_is_neither_obeyed_nor_taken_for_another(store):
    said = "\x1b[2J[bold]x[/bold]\nassistant\nI agree."
    store.add(RENDERED, ["Yes."], messages=[{"role": "us\x07er", "content": said}])
    lines = [line.strip("│").rstrip() for line in terminal(store).splitlines()]
    assert lines[1:5] == [r" us\x07er", r"   \x1b[2J[bold]x[/bold]", "   assistant", "   I agree."]


def test_exports_have_messages_beside_the_text(store, tmp_path):
    for kind, texts in TEXTS.items():
        store.add(RENDERED, texts, kind, messages=MESSAGES)
    store.add("It was", ["x", "y"], "compare")
    answer_all(store)
    for form, n in (("pairs", 5), ("rankings", 3), ("scores", 1)):
        assert export(store, tmp_path / f"{form}.jsonl", form) == n
        rows = [json.loads(line) for line in (tmp_path / f"{form}.jsonl").read_text().splitlines()]
        chats = [row for row in rows if row["prompt"] == RENDERED]
        assert len(chats) == n - (form != "scores") and all(row["messages"] == list(MESSAGES) for row in chats)
        assert not any("messages" in row for row in rows if row["prompt"] == "It was")
    with FeedbackStore(tmp_path / "copy.db") as copy:
        rows = list(rows_of(store.answers(), "pairs"))
        pairs = [((row["chosen"], row["rejected"]), row) for row in rows]
        copy.record(
            Record("compare", row["prompt"], texts, 0, row["rater"], messages=row.get("messages"))
            for texts, row in pairs
        )
        columns = ("prompt", "messages", "chosen", "rejected", "rater")
        copied = list(rows_of(copy.answers(), "pairs"))
        assert [[row.get(c) for c in columns] for row in copied] == [[row.get(c) for c in columns] for row in rows]


@pytest.mark.parametrize("kind", TEXTS)
def test_reward_models_learn_from_the_rendered_text_as_before(kind, tmp_path):
    data = []
    for messages in (MESSAGES, None):
        path = tmp_path / f"{messages is None}.db"
        with FeedbackStore(path, seed=0) as store:
            for number in range(10):
                store.add(f"{number}{RENDERED}", TEXTS[kind], kind, messages=messages)
            answer_all(store)
        data.append(read_feedback(str(path)))
    assert data[0] == data[1] and len(data[0].data) == 9
    assert "<|im_start|>user\nIs it good?" in repr(data[0].data[0]).replace("\\n", "\n")


def test_the_reward_of_people_asks_about_messages(path):
    reward = HumanReward(path)
    tokenizer = CharTokenizer()
    preds = Preds(tokenizer, tokenizer.encode("yes"))
    prompts = [Prompt(RENDERED, messages=MESSAGES), Prompt("it was"), Prompt(RENDERED, messages=MESSAGES)]
    seen = []

    def attend(items):
        with FeedbackStore(path) as store:
            while (item := store.next("ann")) is not None:
                seen.append((item.prompt, item.messages))
                store.score(item, [4])

    reward.attend = attend
    assert reward.score(prompts, [preds] * 3, [True] * 3) == [4.0, 4.0, 4.0]
    assert seen == [(RENDERED, MESSAGES), ("it was", None)]
    resumed = HumanReward(path)
    resumed.attend = lambda items: pytest.fail(f"asked for {items}")
    assert resumed.score(prompts, [preds] * 3, [True] * 3) == [4.0, 4.0, 4.0]


class Learned(BatchReward):
    """A learner that scores texts by their length."""

    def fit(self, answers):
        assert answers

    def score(self, prompts, preds, dones):
        return [float(len(completion.text)) for completion in preds]


def test_a_reward_that_learns_from_people_asks_about_messages(store, path):
    store.add("p", ["a", "bb"], "rank")
    answer_all(store)
    tokenizer = CharTokenizer()
    preds = [Preds(tokenizer, tokenizer.encode(text)) for text in ("yes", "no")]
    reward = HumanReward(path, learned=Learned(), kind="rank", every=1)
    reward.score([Prompt(RENDERED, messages=MESSAGES)] * 2, preds, [True] * 2)
    item = store.next("ann")
    assert (item.prompt, item.messages, sorted(item.completions)) == (RENDERED, MESSAGES, ["no", "yes"])


@pytest.mark.parametrize("kind", TEXTS)
def test_the_page_gets_messages_and_answers_as_before(store, kind):
    pytest.importorskip("starlette", reason='needs starlette: pip install "textenv[feedback]"')
    pytest.importorskip("httpx2", reason="needs httpx2, which starlette's test client uses")
    from tests.helpers.feedback import visit

    store.add(RENDERED, TEXTS[kind], kind, messages=MESSAGES)
    client = visit(store)
    item = client.post("/api/next", json={}).json()["item"]
    assert item["messages"] == list(MESSAGES) and sorted(item["completions"]) == sorted(TEXTS[kind])
    value = {"score": [4], "compare": "a", "rank": [0, 1, 2]}[kind]
    body = {"showing": item["showing"], "kind": kind, "value": value}
    assert client.post("/api/answer", json=body).json()["progress"]["done"] == 1
    assert [row["messages"] for row in client.get("/api/history").json()["rows"]] == [list(MESSAGES)]
    assert [client.get(f"/api/history?search={word}").json()["n"] for word in ("IS IT", "im_start")] == [1, 0]
    form = {"score": "scores", "compare": "pairs", "rank": "rankings"}[kind]
    row = json.loads(client.get(f"/export?form={form}").text.splitlines()[0])
    assert (row["prompt"], row["messages"]) == (RENDERED, list(MESSAGES))


@pytest.mark.slow  # a browser
def test_the_page_shows_roles_and_texts_and_obeys_no_message(store, path):
    from tests.helpers.browsing import Browser, Server, need_browser

    pytest.importorskip("starlette", reason='needs starlette: pip install "textenv[feedback]"')
    need_browser()
    hostile = [{"role": BAD, "content": BAD}, {"role": "user", "content": f"Is\n\n  it?</div>{BAD}"}]
    for kind, texts in TEXTS.items():
        store.add(RENDERED, texts, kind, messages=MESSAGES)
    store.add(RENDERED, ["Yes."], messages=hostile)
    store.add("It was", [" good."])
    keys = {"score": ("4", "\ue007"), "compare": ("a",), "rank": ("1", "2", "\ue007")}
    server, browser = Server(path), Browser()
    try:
        browser.enter(server.url)
        for number, messages in enumerate([MESSAGES] * 3 + [hostile]):
            kind = ("score", "compare", "rank", "score")[number]
            browser.until(lambda kind=kind: browser.one("#item").get_attribute("data-kind") == kind)
            wanted = [message["content"] for message in messages]
            browser.until(lambda wanted=wanted: browser.texts("#prompt .content") == wanted)
            assert browser.texts("#prompt .role") == [message["role"] for message in messages]
            assert "im_start" not in browser.run("return document.body.innerText")
            browser.keep(f"chat_{kind}_{number}")
            browser.press(*keys[kind])
            browser.until(lambda number=number: len(store.answers()) == number + 1)
        browser.shows("It was")
        browser.driver.get(server.url + "history")
        browser.until(lambda: len(browser.texts("tbody tr")) == 4)
        assert browser.texts("td.text .content")[:2] == [message["content"] for message in hostile]
        browser.keep("chat_history")
        for page in ("", "history"):
            browser.driver.get(server.url + page)
            browser.until(lambda: browser.all("#prompt, .message"))
            assert browser.all("main img, main script") == []
            assert browser.run("return typeof pwned") == "undefined"
        assert browser.complaints() == []
    finally:
        browser.close()
        server.kill()
