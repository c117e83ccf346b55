"""A rating server in a process of its own, and browsers that visit it."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.helpers.command import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,800"),
    "--hide-scrollbars",
    "--host-resolver-rules=MAP rebound.example 127.0.0.1",
)
SERVE = """
import json, sys
from textenv.feedback.store import FeedbackStore
from textenv.feedback.web import serve
serve(FeedbackStore(sys.argv[1], seed=0), **json.loads(sys.argv[2]))
"""
PATIENCE = 20.0  # seconds that `until` waits


class Server:
    """The rating server as users run it. `kill` gives it no time to finish anything."""

    def __init__(self, store, options="{}"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-c", SERVE, str(store), options]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), "the server did not start"
        self.port = int(self.url.split(":")[2].split("/")[0])

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Browser:
    """A Chromium without a window, with a profile of its own."""

    def __init__(self):
        from selenium import webdriver

        self.folder = tempfile.mkdtemp()
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={self.folder}/profile"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": f"{self.folder}/downloads"})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def close(self):
        self.driver.quit()
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self):
        """Become a visitor who was never here: no cookies, no emulated phone, no log."""
        self.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.get("about:blank")
        self.driver.get_log("browser")

    def enter(self, url, rater="ann"):
        """Open a page and say who rates."""
        self.driver.get(url)
        self.keep("name")
        self.one("#rater").send_keys(rater)
        self.press("\ue007")
        self.until(lambda: self.all("#item, #nothing"))

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        """Return the elements' texts, exactly as they are in the page."""
        return [element.get_property("textContent") for element in self.all(selector)]

    def press(self, *keys, holding=""):
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver)
        if holding:
            chain.key_down(holding).send_keys(*keys).key_up(holding).perform()
        else:
            chain.send_keys(*keys).perform()

    def drag(self, selector, start, end):
        """Drag the row with index `start` to the row with index `end`."""
        from selenium.webdriver.common.action_chains import ActionChains

        rows = self.all(selector)
        gap = rows[end].rect["y"] - rows[start].rect["y"]
        chain = ActionChains(self.driver).click_and_hold(rows[start])
        chain.move_by_offset(0, int(gap / 2)).move_by_offset(
            0, int(gap / 2 + (4 if gap > 0 else -4))
        ).release().perform()

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition, what="the page to change"):
        """Wait until a condition holds, and return what it returned."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE
        while True:
            try:
                if result := condition():
                    return result
            except WebDriverException:  # the page replaced an element between finding and reading it
                pass
            if time.monotonic() > end:
                body = self.run("return document.body.innerText")
                raise AssertionError(f"Waited {PATIENCE:g} s for {what}, got the page:\n{body}")
            time.sleep(0.03)

    def shows(self, prompt):
        """Wait until the item with this prompt is shown."""
        self.until(lambda: self.one("#prompt").is_displayed() and self.texts("#prompt") == [prompt], f"{prompt!r}")

    def says(self, text):
        """Wait until the status line contains a text."""
        self.until(lambda: text in self.texts("#status")[0], repr(text))

    def phone(self):
        """Emulate a phone, 390 pixels wide."""
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme):
        """Prefer "light" or "dark" pages."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def keep(self, name):
        """Save a screenshot to the folder of the environment variable TEXTENV_SCREENSHOTS, if it is set."""
        folder = os.environ.get("TEXTENV_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def complaints(self):
        """Return the errors that the browser has logged since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


def need_browser():
    """Skip the test, with the reason, where no browser is installed."""
    pytest.importorskip("selenium", reason='needs selenium: pip install "textenv[dev]"')
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
