"""The live view of `textenv train`, as a person sees it in a terminal: a tmux session, captured as text."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.command import ROLLOUT, environment, settings, small_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, which shows what a terminal would"),
]
ROLLOUTS = 60


class Terminal:
    """A tmux session of 100 columns and 24 rows, on a tmux server of its own."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "tmux"
        self.folder = folder

    def tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-S", self.socket, *words], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *words: object) -> None:
        command = " ".join(f"'{word}'" for word in (sys.executable, "-m", "agents.cli", *words))
        shell = f"cd {self.folder}; {command}; echo code $?; exec cat"
        self.tmux("new-session", "-d", "-x", "100", "-y", "24", shell)

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Return the screen once it shows a pattern."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            screen = self.tmux("capture-pane", "-p")
            if re.search(pattern, screen):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"{pattern!r} never came:\n{screen}")


@pytest.fixture
def terminal(tmp_path):
    made = Terminal(tmp_path)
    yield made
    subprocess.run(["tmux", "-S", made.socket, "kill-server"], capture_output=True, check=False)


def test_the_live_view_in_a_terminal_and_ctrl_c(terminal, tmp_path):
    model = small_model(tmp_path / "small")
    terminal.start("train", *settings(model, tmp_path / "run", ROLLOUTS, checkpoint_every=20))
    total = f"{ROLLOUTS * ROLLOUT:,} tokens"
    first = terminal.until(rf"[\d,]+ / {total} .*\d:\d\d:\d\d left")
    assert re.search(r"evaluated +reward +kl +entropy +length +tokens/s", first)
    samples = [line for line in first.splitlines() if re.match(r"\d\.\d\d  this \w+ is", line)]
    assert len(samples) == 4
    tokens = int(re.search(rf"([\d,]+) / {total}", first)[1].replace(",", ""))
    later = terminal.until(rf"([\d,]+) / {total}(?<!{tokens:,} / {total})")
    assert later.count(" / ") == 1, "the view stays in its place"
    terminal.tmux("send-keys", "C-c")
    last = terminal.until(r"code \d+")
    assert "stopping when this iteration is done and saved" in last and "code 130" in last
    assert re.search(r"stopped after [\d,]+ tokens, saved; continue with: textenv train --resume", last)
    assert terminal.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1", "the cursor is back"
