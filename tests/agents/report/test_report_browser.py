"""The report's page in Chromium, opened from the disk."""

import json
import time

import numpy as np
import pytest

from agents.report.page import page
from agents.report.report import report_data, write_report
from tests.agents.report.made_runs import PROMPTS, made_run

pytestmark = pytest.mark.slow  # Chromium takes seconds to start

EVIL = (
    '</script><script>document.title="hacked"</script><img src=x onerror="document.title=1"><b onclick=x>\u202ebold</b>'
)


@pytest.fixture
def browser(chromium):
    chromium.forget()
    chromium.prefer("light")
    yield chromium
    chromium.run("localStorage.clear()")
    assert chromium.complaints() == []


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of one run of six iterations."""
    folder = made_run(tmp_path_factory.mktemp("made") / "mine")
    values = {"critic": [0.1, 0.2], "monte_carlo": [0.3, 0.4], "low": [0.2, None], "high": [0.4, None]}
    (folder / "credit.json").write_text(json.dumps([{"prompt": "The", "tokens": [" a", " b"], **values}]))
    return write_report([folder])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The report of two folders, of two seeds and of one."""
    folder = tmp_path_factory.mktemp("made")
    for i, name in enumerate(("a/seed_0", "a/seed_1", "b")):
        config = {"algorithm.learning_rate": 1e-3} if name == "b" else {}
        made_run(folder / name, seed=i % 2, config=config, noise=np.full(6, 0.1 * i), rewards=(1.0 - 0.3 * i,) * 4)
    return write_report([folder / "a", folder / "b"], folder / "both.html")


def opened(browser, file):
    browser.driver.get(file.as_uri())


def choose(browser, key, label):
    from selenium.webdriver.support.ui import Select

    Select(browser.one(key)).select_by_visible_text(label)


def point(browser, element):
    from selenium.webdriver.common.action_chains import ActionChains

    browser.run("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser.driver).move_to_element(element).perform()


def panel(name):
    return f"[data-panel='{name}']"


# Every control


def test_curves_can_be_read_hidden_and_chosen(browser, written):
    opened(browser, written)
    assert len(browser.all("#happened .card p")) == 5
    point(browser, browser.one(f"{panel('reward')} svg"))
    said = browser.texts(f"{panel('reward')} .reading")[0]
    # The middle of the panel is at 192 tokens, the third of six iterations; the evaluations are at 0 and 384.
    assert said == "192 tokenstraining 0.4"
    assert len(browser.all(f"{panel('explained')} path.line")) == 4
    browser.all(f"{panel('explained')} .name")[1].click()
    assert len(browser.all(f"{panel('explained')} path.line")) == 3
    browser.all(f"{panel('explained')} .name")[1].click()
    assert len(browser.all(f"{panel('explained')} path.line")) == 4
    choose(browser, ".other select", "train/approx_kl")
    assert browser.texts(f"{panel('other')} figcaption") == ["train/approx_kl"]
    assert len(browser.all(f"{panel('reward')} circle")) == 2 and len(browser.all(f"{panel('reward')} .bar")) == 2
    assert len(browser.all(f"{panel('time')} path.area")) == 4
    browser.keep("report")


def test_a_spike_is_marked_at_the_edge_and_does_not_flatten_the_panel(browser, tmp_path):
    opened(browser, write_report([made_run(tmp_path / "run", n=12, noise=np.array([0.0] * 5 + [900.0] + [0.0] * 6))]))
    assert browser.texts(f"{panel('reward')} .spike title") == ["900"]
    assert float(browser.texts(f"{panel('reward')} .tick")[0]) < 1, "the lowest line of the grid"


def test_samples_stand_side_by_side_with_changes_marked(browser, written):
    opened(browser, written)
    assert len(browser.all("#samples article")) == 4 and len(browser.all("#samples article:first-of-type .sample")) == 2
    first = browser.one("#samples article")
    marks = [mark.get_property("textContent") for mark in first.find_elements("css selector", "mark")]
    assert marks == [" very", " !"], "very good film ! against good film ."
    last = browser.all("#samples article")[3]
    assert [mark.get_property("textContent") for mark in last.find_elements("css selector", "mark")] == ["不"]
    browser.one("#samples input[type=checkbox]").click()
    assert browser.all("#samples mark") == []
    choose(browser, "#samples select", "all tables")
    assert len(browser.all("#samples .sample")) == 8


def test_tokens_have_their_numbers_and_colours(browser, written):
    opened(browser, written)
    tokens = browser.all("#tokens .token")
    assert "".join(browser.texts("#tokens .token")) == " good film ."
    point(browser, tokens[3])
    shown = dict(zip(browser.texts("#tokens dt"), browser.texts("#tokens dd")))
    assert shown["value"] == "0.25" and shown["advantage"] == "-0.15" and shown["ratio before clipping"] == "1.2"
    assert shown["clipped"] == "yes" and shown["tokens that were allowed"] == "100"
    assert browser.texts(".alternatives .text") == ["film", " bad", "⏎\n", "<b>", "∅"]
    assert browser.texts(".alternatives .taken .text") == ["film"]
    assert "above" in tokens[0].get_attribute("class") and "below" in tokens[3].get_attribute("class")
    for colour in ("reward", "return", "value", "KL of the token, nats", "entropy, nats", "ratio before clipping"):
        choose(browser, "[data-key=colour] select", colour)
        assert browser.all("#tokens .token.above"), colour
    choose(browser, "[data-key=colour] select", "clipped")
    shares = [
        browser.run("return arguments[0].style.getPropertyValue('--share')", one)
        for one in browser.all("#tokens .token")
    ]
    assert shares == ["0%", "72%"] * 3
    choose(browser, "[data-key=table] select", "64")
    choose(browser, "[data-key=episode] select", "reward 0.25")
    browser.all("#tokens .token")[0].click()
    browser.press("\ue014")  # the right arrow goes to the next token
    assert browser.texts("#tokens .details .quiet")[0] == " token 2 / 6"
    assert len(browser.all(f"{panel('along')} path.line")) == 3


def test_values_by_monte_carlo_stand_beside_the_critics(browser, written):
    opened(browser, written)
    assert browser.texts("#credit .card > .text") == ["The a b"]
    assert (
        len(browser.all(f"{panel('credit0')} path.line")) == 2
        and len(browser.all(f"{panel('credit0')} path.band")) == 1
    )
    assert browser.texts(f"{panel('credit0')} .name") == ["Monte Carlo", "critic"]


def test_the_configuration_can_be_searched(browser, written):
    opened(browser, written)
    browser.one("#settings summary").click()
    browser.one("#settings input").send_keys("learning")
    assert browser.texts("#settings tbody tr") == ["algorithm.learning_rate0.0001"]


def test_language_and_theme_are_chosen_and_kept(browser, written):
    opened(browser, written)
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.run(ground)
    browser.one(".theme").click()
    browser.one(".language").click()
    dark = browser.run(ground)
    assert browser.texts("h1")[0] == "发生了什么" and dark != light
    assert browser.run("return document.documentElement.lang") == "zh-Hans"
    browser.driver.refresh()
    assert browser.texts("h1")[0] == "发生了什么" and browser.run(ground) == dark
    said = browser.run("return document.getElementById('main').innerText")
    for english in (
        "What happened",
        "Curves",
        "Samples",
        "Token view",
        "first third",
        "Colour by",
        "Entropy",
        "cut off",
    ):
        assert english not in said, english
    browser.keep("report_zh_dark")


def test_the_system_decides_where_nobody_chose(browser, written):
    browser.prefer("dark")
    opened(browser, written)
    assert browser.texts(".theme") == ["Light"]
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"


def test_several_runs(browser, compared):
    opened(browser, compared)
    assert len(browser.all(f"{panel('kl')} path.line")) == 2 and len(browser.all(f"{panel('kl')} path.band")) == 2
    assert browser.texts("#several h2")[:2] == ["a against b", "Seeds of a"]
    assert "algorithm.learning_rate0.00010.001" in browser.texts("#several tr")
    choose(browser, "#happened select", "b")
    assert "seed 0" in browser.texts("#happened .card p")[0]
    assert browser.texts("#happened .card p")[1].startswith(
        "The reward of 4 evaluated prompts went from 0.250 to 0.400"
    )
    browser.keep("report_several")


# Phones


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("which", ["written", "compared"])
def test_a_phone_shows_everything_in_its_width(browser, request, which, language):
    browser.phone()
    opened(browser, request.getfixturevalue(which))
    if language == "zh":
        browser.one(".language").click()
    assert browser.run("return document.documentElement.scrollWidth") == 390
    browser.run("arguments[0].click()", browser.all("#tokens .token")[2])
    assert len(browser.all("#tokens dd")) == 11
    browser.keep(f"report_phone_{which}_{language}")


# Texts are texts


def test_html_and_scripts_of_a_model_are_shown_and_not_run(browser, tmp_path):
    folder = made_run(tmp_path / "run", texts=[[f"{EVIL} a"] * 4, [f"{EVIL} b"] * 4], config={"env.id": EVIL})
    rows = (folder / "tokens.jsonl").read_text().replace('"The film was"', '"<script>document.title=2</script>"')
    (folder / "tokens.jsonl").write_text(rows)
    data = report_data([folder])
    data["runs"][0]["findings"] = [{"cause": EVIL, "evidence": EVIL, "cure": EVIL}]
    file = tmp_path / "evil.html"
    file.write_text(page(EVIL, data), encoding="utf-8")
    opened(browser, file)
    browser.all("#tokens .token")[1].click()
    browser.one(".language").click()
    time.sleep(0.2)
    assert browser.run("return document.title") == EVIL and not browser.all("main img, main script, main b[onclick]")
    assert EVIL.replace("\u202e", "\\u202e") in browser.texts("#samples .sample p")[0], (
        "the override of direction is shown"
    )
    assert browser.texts("#samples .prompt") == list(PROMPTS)
    assert browser.texts("#findings b") == [EVIL]


# Speed, and pages of runs that go on


def test_a_run_of_500_iterations_opens_in_less_than_two_seconds(browser, tmp_path):
    long = " a rather long text of the policy , word by word ." * 20
    file = write_report([made_run(tmp_path / "run", n=500, texts=[[f"{i}{long}"] * 4 for i in range(51)])])
    assert file.stat().st_size < 3_000_000
    # Seconds of this thread's CPU: the clock on the wall would measure what else the machine does.
    browser.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    opened(browser, file)
    figures = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    seconds = next(figure["value"] for figure in figures if figure["name"] == "TaskDuration")
    assert len(browser.all(".panel")) > 10 and seconds < 2


def test_a_page_of_a_run_that_goes_on_follows_it(browser, tmp_path):
    folder = made_run(tmp_path / "run", finished=False)
    file = write_report([folder], live=2)
    opened(browser, file)
    press = "document.querySelector('.live button').click()"  # at once: the page may load again at any time
    browser.run(press)
    assert browser.texts(".live button") == ["Go on"]
    (folder / "results.json").write_text("{}")
    write_report([folder])
    time.sleep(2.5)
    assert browser.texts(".live button") == ["Go on"], "a paused page stays as it is"
    browser.run(press)
    browser.until(lambda: not browser.all(".live"))
    assert browser.texts("#happened .card p")[4].startswith("It is finished")
