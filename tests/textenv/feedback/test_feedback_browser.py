"""The rating page in Chromium, with the real server in its own process."""

import http.server
import json
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.browsing import PATIENCE, Browser, Server
from textenv.feedback.store import FeedbackStore

pytest.importorskip("starlette", reason='needs starlette: pip install "textenv[feedback]"')
pytestmark = pytest.mark.slow

ENTER, BACKSPACE, LEFT, CONTROL = "\ue007", "\ue003", "\ue012", "\ue009"
TOKEN = "a-token-of-enough-characters"


@pytest.fixture
def browser(chromium, serve):  # `serve` ends after the complaints are read: an open page goes on asking its server
    chromium.forget()
    yield chromium
    assert chromium.complaints() == []


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "answers.db") as opened:
        yield opened


@pytest.fixture
def serve(store):
    """Start servers for the store, and end them after the test."""
    started = []

    def start(**options):
        started.append(Server(store.path, json.dumps(options)))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


def cards(browser):
    return browser.texts(".completion .text")


def saved(browser, number, store):
    """Wait until an answer is acknowledged, and return it from the file."""
    browser.says("Saved")
    browser.until(lambda: len(store.answers()) == number, f"{number} answers")
    return store.answers()[-1]


def pairs(store, n, **options):
    for number in range(n):
        store.add(f"compare {number}", ["x", "y"], kind="compare", **options)


def test_score_with_keys_and_with_the_slider(browser, store, serve):
    store.add("The soup was", [" rich.", " soup."], models=["old", "new"], scale=(1, 7))
    store.add("The film was", [" long."])
    browser.enter(serve().url)
    browser.shows("The soup was")
    assert not browser.one("#send").is_enabled()
    browser.press("9", "6", "2")  # nine is beyond the scale
    browser.keep("score")
    wanted = dict(zip(cards(browser), [6.0, 2.0]))
    browser.press(ENTER)
    answer = saved(browser, 1, store)
    assert dict(zip(("rich.", "soup."), answer.value)) == wanted and 0 < answer.seconds < 60
    browser.shows("The film was")
    assert browser.texts(".score") == ["–"] and not browser.one("#send").is_enabled()
    slider = browser.one("input[type=range]")
    slider.click()  # in its middle
    assert browser.texts(".score") == ["3"]
    slider.send_keys(LEFT)
    browser.one("#send").click()
    assert saved(browser, 2, store).value == (2.0,)
    browser.until(lambda: browser.one("#nothing").is_displayed())
    browser.keep("done")


def test_compare_skip_and_undo(browser, store, serve):
    pairs(store, 4)
    browser.enter(serve().url)
    browser.shows("compare 0")
    browser.keep("compare")
    first = cards(browser)
    browser.press("a")
    assert ("x", "y")[saved(browser, 1, store).value] == first[0]
    browser.shows("compare 1")
    browser.one("[data-choice=tie]").click()
    assert saved(browser, 2, store).value == "tie"
    browser.shows("compare 2")
    browser.press("x")
    assert saved(browser, 3, store).value == "both_bad"
    browser.shows("compare 3")
    browser.press("s")
    browser.says("Skipped")
    assert [answer.kind for answer in store.answers()] == ["compare"] * 3 + ["skip"]
    assert browser.texts("#count") == ["4 of 4 · 1 skipped"]
    browser.press("u")
    browser.shows("compare 3")
    browser.press("z", holding=CONTROL)
    browser.shows("compare 2")
    browser.one("#undo").click()
    browser.shows("compare 1")
    browser.says("Taken back")
    assert [answer.prompt for answer in store.answers()] == ["compare 0"]
    second = cards(browser)
    browser.press("b")
    assert ("x", "y")[saved(browser, 2, store).value] == second[1]


def test_rank_by_number_keys_and_by_dragging(browser, store, serve):
    texts = ["w", "x", "y", "z"]
    store.add("p", texts, kind="rank")
    store.add("q", texts, kind="rank")
    browser.enter(serve().url)
    browser.shows("p")
    shown = cards(browser)

    def preview():
        return browser.texts(".order li:not(.unset) .short")

    browser.press("3", "3", "1", "9")
    assert preview() == [shown[2], shown[0]]
    browser.press(BACKSPACE)
    assert preview() == [shown[2]] and not browser.one("#send").is_enabled()
    browser.press("2", "4")  # the last rank follows
    assert preview() == [shown[index] for index in (2, 1, 3, 0)]
    browser.keep("rank")
    browser.press(ENTER)
    assert [texts[index] for index in saved(browser, 1, store).value] == [shown[index] for index in (2, 1, 3, 0)]
    browser.shows("q")
    shown = cards(browser)
    for card in browser.all(".texts .completion"):
        if not card.find_element("css selector", ".badge").text:
            card.click()
    assert preview() == shown
    browser.drag(".order li", 3, 0)
    assert preview() == [shown[index] for index in (3, 0, 1, 2)]
    browser.drag(".order li", 0, 2)
    assert preview() == [shown[index] for index in (0, 1, 3, 2)]
    browser.one("#send").click()
    assert [texts[index] for index in saved(browser, 2, store).value] == [shown[index] for index in (0, 1, 3, 2)]


def test_eight_can_be_ranked(browser, store, serve):
    store.add("p", list("abcdefgh"), kind="rank")
    browser.enter(serve().url)
    browser.shows("p")
    shown = cards(browser)
    browser.press(*"87654321", ENTER)
    assert ["abcdefgh"[index] for index in saved(browser, 1, store).value] == shown[::-1]


KEYS = (  # questions (kind, number of texts, scale), and how the line of keys begins in English and Chinese
    ("rank", 4, (1, 5), "1–4 next best, Backspace", "1–4 选下一名，Backspace"),
    ("score", 1, (1, 5), "1–5 score, ← → change, Enter", "1–5 打分，← → 调整，Enter"),
    ("score", 3, (0, 10), "0–9 score, ↑ ↓ text, ← →", "0–9 打分，↑ ↓ 选择文本，← →"),
    ("score", 1, (8.5, 9.5), "9 score, ← →", "9 打分，← →"),
    ("score", 1, (-5, -1), "← → change", "← → 调整"),
    ("compare", 2, (1, 5), "A or ←, B or →", "A 或 ←，B 或 →"),
)


def test_the_page_names_the_keys_that_work(browser, store, serve):
    for number, (kind, n, scale, *_) in enumerate(KEYS):
        store.add(f"question {number}", ["x"] * n, kind, scale=scale)
    browser.enter(url := serve().url)
    for number, (kind, _, _, *heads) in enumerate(KEYS):
        for language, first, head, last in zip(("en", "zh"), ("Keys: ", "快捷键: "), heads, ("U undo", "U 撤销")):
            browser.driver.get(f"{url}?language={language}")
            browser.shows(f"question {number}")
            [line] = browser.texts(".keys")
            assert line.startswith(first + head) and line.endswith(last), line
            browser.keep(f"keys_{kind}_{number}_{language}")
        browser.press("s")


def test_a_reload_brings_back_the_same_item_and_what_was_begun(browser, store, serve):
    store.add("p", ["w", "x", "y", "z"], kind="rank")
    browser.enter(serve().url)
    browser.shows("p")
    shown = cards(browser)
    browser.press("4", "2")
    browser.driver.refresh()
    browser.shows("p")
    assert cards(browser) == shown
    assert browser.texts(".order li:not(.unset) .short") == [shown[3], shown[1]]
    assert store.answers() == []


def test_two_raters_at_once(browser, store, serve):
    pairs(store, 12)
    url = serve().url
    other = Browser()
    try:
        browser.enter(url, "ann")
        other.enter(url, "bob")
        browser.shows("compare 0")
        other.shows("compare 1")  # another item

        def rate(window):
            while not window.one("#nothing").is_displayed():
                window.press("a")

        raters = [threading.Thread(target=rate, args=(window,)) for window in (browser, other)]
        for rater in raters:
            rater.start()
        for rater in raters:
            rater.join(PATIENCE)
            assert not rater.is_alive()
        assert other.complaints() == []
    finally:
        other.close()
    answers = store.answers()
    assert {answer.prompt for answer in answers} == {f"compare {number}" for number in range(12)}
    assert len(answers) <= 13  # the last item may be given to both raters
    assert min(sum(answer.rater == rater for answer in answers) for rater in ("ann", "bob")) > 1


def test_a_server_that_is_killed_loses_nothing_that_was_acknowledged(browser, store, serve):
    pairs(store, 6)
    server = serve()
    browser.enter(server.url)
    for number in range(3):
        browser.shows(f"compare {number}")
        browser.press("a")
    browser.shows("compare 3")  # the next item shows that the third answer was stored
    server.kill()
    assert [answer.prompt for answer in store.answers()] == ["compare 0", "compare 1", "compare 2"]
    browser.press("b")
    browser.says("Not saved")
    browser.shows("compare 3")
    assert any("ERR_CONNECTION_REFUSED" in complaint for complaint in browser.complaints())
    shown = cards(browser)
    serve(port=server.port)
    browser.press("b")
    answer = saved(browser, 4, store)
    assert answer.prompt == "compare 3" and ("x", "y")[answer.value] == shown[1]
    browser.shows("compare 4")


def test_a_script_in_a_text_stays_a_text(browser, store, serve):
    bad = '<script>pwned = 1</script><img src=x onerror="pwned = 1"><a href="javascript:pwned = 1">{{ 7 * 7 }}</a>'
    store.add(bad, [bad, "</p>" + bad], kind="rank")
    url = serve().url
    browser.enter(url, "<img src=x onerror=alert(1)>")
    browser.shows(bad)
    browser.keep("injection")
    assert sorted(cards(browser)) == sorted([bad, "</p>" + bad])
    browser.press("1", ENTER)
    saved(browser, 1, store)
    browser.driver.get(url + "history")
    browser.until(lambda: browser.texts("td.text") == [bad])
    for path in ("", "history"):
        browser.driver.get(url + path)
        time.sleep(0.2)
        assert browser.all("main img, main script, main a[href^=javascript], header img") == []
        assert browser.run("return typeof pwned") == "undefined"
    assert browser.complaints() == []
    script = "const s = document.createElement('script'); s.textContent = 'pwned = 1'; document.body.append(s)"
    browser.run(script)  # a script that got into the page would not run
    assert browser.run("return typeof pwned") == "undefined"
    assert all("Content Security Policy" in complaint for complaint in browser.complaints())


def test_the_token(browser, store, serve):
    pairs(store, 1)
    url = serve(token=TOKEN).url
    plain = url.split("?")[0]
    for wrong in (plain, plain + "?token=wrong", plain + "history"):
        browser.driver.get(wrong)
        assert "needs the address that was printed" in browser.one("main").text
    browser.keep("token")
    assert all("401" in complaint for complaint in browser.complaints())
    browser.enter(url)
    assert browser.driver.current_url == plain and browser.run("return document.cookie") == ""
    browser.shows("compare 0")
    kept = {cookie["value"]: cookie for cookie in browser.driver.get_cookies()}[TOKEN]
    assert kept["httpOnly"] and kept["sameSite"] == "Strict"
    browser.press("a")
    saved(browser, 1, store)


def test_another_site_cannot_answer(browser, store, serve, tmp_path):
    """Refused are another site's page that sends answers, and a foreign domain that resolves to our server."""
    pairs(store, 1)
    server = serve()
    browser.enter(server.url)
    browser.shows("compare 0")
    page = f"""<body><script>
        const body = JSON.stringify({{showing: 1, kind: "compare", value: "a"}});
        const send = (type) => fetch("{server.url}api/answer", {{method: "POST", mode: type ? "cors" : "no-cors", body,
            credentials: "include", headers: {{"content-type": type || "text/plain"}}}}).catch((error) => error);
        Promise.all([send(""), send("application/json")]).then(() => document.body.append("sent"));
    </script>"""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text(page)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=tmp_path / "site")) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        for host in ("localhost", "127.0.0.1"):  # another site, and the same site on another port
            browser.driver.get(f"http://{host}:{site.server_port}/index.html")
            browser.until(lambda: "sent" in browser.one("body").text)
        site.shutdown()
    assert store.answers() == []
    browser.driver.get(f"http://rebound.example:{server.port}/")
    assert "Expected a host that is ours" in browser.one("body").text
    assert browser.complaints()  # about the refused requests
    browser.driver.get(server.url)
    browser.shows("compare 0")


def test_history_filters_and_downloads(browser, store, serve):
    pairs(store, 3)
    store.add("rank", ["x", "y", "z"], kind="rank")
    store.add("theirs", ["x"])
    while (shown := store.next("ann")) is not None and shown.kind != "score":
        store.choose(shown, "a") if shown.kind == "compare" else store.rank(shown, [0, 1, 2])
    store.undo("ann"), store.rank(shown := store.next("ann"), [2, 0, 1])
    store.score(store.next("bob"), [4])
    url = serve().url
    browser.enter(url)
    browser.one("a[href='/history']").click()
    browser.until(lambda: browser.texts("tbody td.text") == ["rank", "compare 2", "compare 1", "compare 0"])
    browser.keep("history")
    select = browser.one("select[name=kind]")
    select.send_keys("R")
    browser.until(lambda: browser.texts("tbody td.text") == ["rank"])
    ranked = [shown.completions[index] for index in (2, 0, 1)]
    assert browser.texts(".said .mark") == ["#1", "#2", "#3"] and browser.texts(".said .text") == ranked
    browser.one("[data-form=pairs]").click()
    file = Path(browser.folder) / "downloads" / "pairs.jsonl"
    browser.until(file.exists, "the download")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    a, b, c = ranked
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(a, b), (a, c), (b, c)]
    select.send_keys("A")
    browser.one("select[name=rater]").send_keys("E")
    browser.until(lambda: len(browser.texts("tbody tr")) == 5)
    browser.one("input[type=search]").send_keys("THEIRS")
    browser.until(lambda: browser.texts("tbody td.text") == ["theirs"])


def test_phone_dark_and_chinese(browser, store, serve):
    long = "A line without an end" + "-" * 200 + "\n\n  indented. " + "word " * 60
    store.add(long, [long, "short"], kind="compare")
    store.add(long, [long, "short", "x"], kind="rank")
    store.add(long, [long, "short"])
    url = serve().url
    browser.phone()
    browser.prefer("dark")
    browser.enter(url)
    for kind, keys in {"compare": "a", "rank": ("2", "1"), "score": ("3", "4")}.items():
        browser.until(lambda kind=kind: browser.one("#item").get_attribute("data-kind") == kind)
        assert browser.run("return document.documentElement.scrollWidth") == 390
        browser.keep(f"{kind}_phone_dark")
        browser.press(*keys)
        if kind != "compare":
            browser.one("#send").click()
    saved(browser, 3, store)
    dark = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.driver.get(url + "history")
    browser.until(lambda: len(browser.texts("tbody tr")) == 3)
    assert browser.run("return document.documentElement.scrollWidth") == 390
    browser.keep("history_phone_dark")
    browser.one(".to-light").click()
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != dark
    browser.one("header a[lang=zh]").click()
    assert browser.texts("th:nth-child(1)") == ["时间"] and browser.run("return document.documentElement.lang") == "zh"
    browser.driver.get(url)
    browser.until(lambda: browser.texts("#nothing h1") == ["全部完成，谢谢！"])
    store.add("new", ["x"])  # while the page is open
    browser.shows("new")
    browser.keep("score_phone_chinese")
    browser.prefer("light")
