"""A wall clock that jumps: rates, the remaining time, patience and the order of checkpoints are unaffected."""

import ast
import datetime as datetimes
import os
import random
import re
import signal
import time

import pytest

from agents.checkpoints.checkpoint import latest_checkpoint, save_step
from agents.checkpoints.manifest import newest_intact
from agents.runs.folder import read_rows
from agents.runs.recording import Recorder
from tests.helpers.command import ROLLOUT, ROOT, rows, run, settings
from tests.helpers.training import tiny_agent

ROLLOUTS = 3


class Jumping:
    """A wall clock that jumps back a day or forward a year at each reading."""

    def __init__(self):
        self.random, self.reads = random.Random(0), 0

    def seconds(self):
        self.reads += 1
        return 1.7e9 + self.random.choice([-86_400.0, 3.15e7]) * self.reads

    def install(self, monkeypatch):
        clock = self

        class Now(datetimes.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromtimestamp(clock.seconds() % 4e9, tz or datetimes.UTC)

        monkeypatch.setattr(time, "time", self.seconds)
        monkeypatch.setattr(time, "time_ns", lambda: int(self.seconds() * 1e9))
        monkeypatch.setattr("agents.runs.folder.datetime", Now)


def words(model, out, **more):
    return settings(model, out, ROLLOUTS, **{"evaluation.patience": 3, "evaluation.every": ROLLOUT, **more})


@pytest.mark.slow
def test_a_run_under_a_jumping_clock_is_the_run(model, tmp_path, monkeypatch, capfd):
    assert run("train", *words(model, tmp_path / "steady"), "--quiet") == 0
    stop, original = [True], Recorder._on_step

    def step(self):
        if self.model.num_timesteps > ROLLOUT and stop:
            stop.clear()
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        clock = Jumping()
        clock.install(patch)
        patch.setattr(Recorder, "_on_step", step)
        assert run("train", *words(model, tmp_path / "jumping")) == 130
        for order, folder in enumerate(sorted((tmp_path / "jumping" / "checkpoints").iterdir(), reverse=True)):
            os.utime(folder, (1e9 + order, 1e9 + order))  # the newest checkpoint gets the oldest time
        assert run("train", "--resume", tmp_path / "jumping") == 0
        assert clock.reads > 10
    shown = capfd.readouterr().out
    assert rows(tmp_path / "steady") == rows(tmp_path / "jumping")
    assert (tmp_path / "steady" / "history.json").read_text() == (tmp_path / "jumping" / "history.json").read_text()
    pair = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("steady", "jumping")]
    assert pair[0] == pair[1]
    left = re.findall(r"left (\d+):(\d\d):(\d\d)", shown)
    assert left and all(int(hours) == 0 and int(minutes) < 5 for hours, minutes, _ in left)
    logged = read_rows(tmp_path / "jumping" / "metrics.jsonl")
    speeds = [row["time/tokens_per_second"] for row in logged if "time/tokens_per_second" in row]
    shares = [row["time/reward_share"] for row in logged if "time/reward_share" in row]
    assert len(speeds) == len(shares) == ROLLOUTS
    assert all(1 < speed < 1e6 for speed in speeds) and all(0 <= share < 1 for share in shares)


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    agent = tiny_agent()
    agent.learn(16)
    first = save_step(agent, tmp_path, keep=3)
    agent.learn(16, reset_num_timesteps=False)
    newest = save_step(agent, tmp_path, keep=3)
    os.utime(first, (2e9, 2e9))
    assert latest_checkpoint(tmp_path) == newest_intact(tmp_path)[0] == newest


def test_no_clock_but_these_is_read():
    """Only these files read the wall clock, for stamps and names; durations come from a clock that cannot jump."""
    allowed = {
        "http_judge.py": "Retry-After is a date",
        "folder.py": "stamps and names",
        "page.py": "the stamp of a report",
        "trackers.py": "stamps of MLflow's figures",
        "store.py": "stamps, and the order in which items were handed out",
    }
    found = {}
    for package in ("agents", "textenv"):
        for folder, _, files in os.walk(ROOT / package):
            for name in files:
                if name.endswith(".py"):
                    with open(os.path.join(folder, name), encoding="utf-8") as stream:
                        hits = re.findall(r"\btime\.time\(|time_ns\(|datetime\.now|utcnow", stream.read())
                    if hits:
                        found[name] = hits
    assert found.keys() <= allowed.keys()


CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time"}


def reads_a_clock(node, known=()):
    """Return whether an expression calls a clock, or uses a name whose value came from one."""
    for inner in ast.walk(node):
        is_clock = isinstance(inner, ast.Attribute) and inner.attr in CLOCKS and ast.unparse(inner.value) == "time"
        if is_clock or (isinstance(inner, ast.Name) and inner.id in known):
            return True
    return False


def races(text):
    """Return the names of a file's default tests that assert how much time passed."""
    tree, found = ast.parse(text), []
    slow = ("mark.slow", "mark.long")
    if any(mark in ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) for mark in slow):
        return []
    for test in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        marks = " ".join(map(ast.unparse, test.decorator_list))
        if not test.name.startswith("test_") or marks.endswith(slow) or any(f"{mark} " in marks for mark in slow):
            continue
        known = set()
        for node in ast.walk(test):
            if isinstance(node, ast.Assign) and reads_a_clock(node.value, known):
                known |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        asserted = [inner for node in ast.walk(test) if isinstance(node, ast.Assert) for inner in ast.walk(node)]
        if any(isinstance(inner, ast.Compare) and reads_a_clock(inner, known) for inner in asserted):
            found.append(test.name)
    return found


def test_no_default_test_races_a_clock():
    """Such a test would fail on a busy machine; counted work is the same everywhere."""
    found = {path.name: races(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert {name: tests for name, tests in found.items() if tests} == {}


@pytest.mark.parametrize(
    ("text", "is_race"),
    [
        ("def test_a():\n    start = time.monotonic()\n    work()\n    assert time.monotonic() - start < 5", True),
        ("def test_a():\n    s = time.time()\n    took = time.time() - s\n    assert all((1, took < 5))", True),
        ("@mark.gpu\ndef test_a():\n    assert 0.1 < time.perf_counter() < 0.2", True),
        ("@mark.slow\ndef test_a():\n    assert time.monotonic() < 5", False),
        ("@mark.slow\n@mark.gpu\ndef test_a():\n    assert time.monotonic() < 5", False),
        ("pytestmark = [mark.slow]\ndef test_a():\n    assert time.monotonic() < 5", False),
        ("def test_a():\n    while time.monotonic() < end: pass\n    assert answer.time < 5", False),
    ],
)
def test_a_race_is_seen(text, is_race):
    assert races(text) == (["test_a"] if is_race else [])
