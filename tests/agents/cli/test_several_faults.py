"""Launches of the command in several processes, each with one thing wrong: one message, and the end within a minute."""

import fcntl
import os
import re
import signal
import socket
import threading
import time
from functools import partial

import pytest

from agents.cli import launch as launcher
from agents.cli import main as cli
from tests.agents.cli.several import child_of_launcher
from tests.helpers.command import ROLLOUT, rows, settings, small_model
from tests.helpers.processes import CONTEXT, free_port, import_once, launch

N_ROLLOUTS = 3
TOKENS = [n * ROLLOUT for n in range(N_ROLLOUTS + 1)]  # of the rows of a whole run


class Forked:
    """A process of the launcher, in place of `subprocess.Popen`: a fork, which need not import anything again."""

    def __init__(self, words, env, start_new_session, folder, fault):
        assert start_new_session, "a terminal must not send Ctrl-C to it directly"
        variables = {name: value for name, value in env.items() if os.environ.get(name) != value}
        arguments = variables, words[len(launcher.STARTS) :], str(folder), fault
        self.process = CONTEXT.Process(target=child_of_launcher, args=arguments, daemon=True)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)


@pytest.fixture(scope="module", autouse=True)
def imported():
    import_once()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a model and prompts, in which the tests run."""
    small_model(tmp_path / "small")
    (tmp_path / "prompts.txt").write_text("this phone is\nthe lamp was\n" * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(home, monkeypatch, capfd, *words, fault=None, size=2):
    """Run the command with `--processes`; return the exit code, what was printed, and the seconds."""
    monkeypatch.setattr(launcher.subprocess, "Popen", partial(Forked, folder=home, fault=fault))
    start = time.monotonic()
    code = cli.main([str(word) for word in (*words, "--processes", size)])
    out, err = (home / name for name in ("out", "err"))
    said = (err.read_text() if err.exists() else "") + capfd.readouterr().err
    return code, out.read_text() if out.exists() else "", said, time.monotonic() - start


def train(out="run", **more):
    return ["train", *settings("small", out, N_ROLLOUTS, **more)]


THERE = {"out": "HOME/run", "model.name": "HOME/small"}  # absolute paths, which the other folder sees, too
CASES = {  # what is wrong, by name: the fault, the words, the exit code, and the message
    "another version": (
        "other version",
        train(),
        2,
        r"same packages .* textenv '0.0.0' in rank 0 and '0.0.1' in rank 1",
    ),
    "another seed": ("other seed", train(), 2, "same settings in all processes, got seed 0 in rank 0 and 1 in"),
    "another key": ("other key", train(), 2, "rank 1: .*sed"),
    "an unknown key": (None, [*train(), "--sed=1"], 2, "textenv: (?!rank).*sed"),
    "no data in one": ("other folder", train(**{**THERE, "env.prompts": "prompts.txt"}), 2, r"rank 1: .*prompts\.txt"),
    "no model in one": ("other folder", train(out="HOME/run"), 2, "rank 1: .*small"),
    "no shared folder": ("other folder", train(**{"model.name": "HOME/small"}), 2, "rank 1: Expected the folder .*run"),
    "no package in one": ("no package", train(loggers="[curves]"), 6, "rank 1: Expected matplotlib"),
    "a reward": ("reward", train(), 4, "rank 1: .*raised KeyError: 'no'"),
    "an evaluation's reward": ("reward of an evaluation", train(), 4, "rank 1: .*raised KeyError: 'no'"),
    "Ctrl-C in one": (
        "interrupt",
        train(),
        130,
        r"textenv: stopped after [\d,]+ tokens, saved; continue with",
    ),
    "killed at the start": ("killed at the start", train(), 137, "rank 1 of 2 processes was ended by SIGKILL"),
    "killed in a rollout": ("killed in a rollout", train(), 137, "rank 1 of 2 processes was ended by SIGKILL"),
    "killed in an evaluation": ("killed in an evaluation", train(), 137, "rank 1 of 2 .* was ended by SIGKILL"),
    "killed in an update": ("killed in an update", train(), 137, "rank 1 of 2 processes was ended by SIGKILL"),
    "out of memory": (
        "out of memory",
        train(),
        2,
        "rank 1: Expected sizes that this machine can hold, got MemoryError",
    ),
    "out of device memory": ("out of device memory", train(), 1, "rank 1: OutOfMemoryError: CUDA out of memory"),
    "a bug in one": ("a bug", train(), 1, r"rank 1: AttributeError: no such thing \(the traceback is in run/log.txt"),
    "a full disk": ("full disk", train(), 5, "The checkpoint could not be written: .*No space left"),
    "a folder that cannot be": (
        None,
        train(out="/proc/self/no/run"),
        2,
        "Expected a folder to write to, got /proc/self",
    ),
    "lanes": (None, train(**{"algorithm.n_envs": 9}), 2, "Expected n_envs to divide by the 2 processes, got 9"),
    "too few lanes": (
        None,
        train(**{"algorithm.n_envs": 1, "algorithm.batch_size": 8}),
        2,
        "by the 2 processes, got 1",
    ),
    "a verb for one": (None, ["tune", "x.yml"], 2, "Expected one process for textenv tune, got 2: start the same"),
    "no seconds": (
        None,
        [*train(), "--timeout=-1"],
        2,
        "Expected --timeout to be a positive number of seconds, got '-1'",
    ),
    "a hang": ("hang", [*train(), "--timeout=3"], 1, "rank 1 .*several.py"),
    "no number": (None, ["train"], 2, "Expected --processes to be a number of 1 or more, got 'two'"),
}


QUICK = ("no number", "another seed")  # the cases of the default suite


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES])
def test_one_thing_is_wrong(case, home, monkeypatch, capfd):
    fault, words, expected, message = CASES[case]
    words = [word.replace("HOME", str(home)) for word in words]
    size = "two" if case == "no number" else 2
    code, _, said, seconds = run(home, monkeypatch, capfd, *words, fault=fault, size=size)
    assert code == expected and seconds < 60, said
    lines = [line for line in said.splitlines() if line.startswith("textenv:")]
    assert len(lines) == 1 and re.search(message, lines[0]), said
    assert "Traceback" not in said
    left = home / "run" / "metrics.jsonl"
    assert expected != 2 or fault == "out of memory" or not left.exists(), "a run that was refused leaves no rows"
    if (home / "run" / "checkpoints").exists():  # nothing was lost: any number goes on to the end
        again = {"killed in a rollout": 1, "killed in an update": 4}.get(case, 2)
        code, *_ = run(home, monkeypatch, capfd, "train", "--resume", "run", size=again)
        assert code == 0 and [row["tokens"] for row in rows(home / "run")] == [
            n * ROLLOUT for n in range(N_ROLLOUTS + 1)
        ]


@pytest.mark.slow
def test_a_folder_that_is_used_or_taken(home, monkeypatch, capfd):
    code, _, said, _ = run(home, monkeypatch, capfd, *train())
    assert code == 0, said
    code, _, said, _ = run(home, monkeypatch, capfd, *train())
    assert code == 2 and said.count("textenv:") == 1 and "continue with --resume run" in said
    (home / "err").unlink()
    with (home / "run" / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        code, _, said, _ = run(home, monkeypatch, capfd, "train", "--resume", "run")
    assert code == 2 and said.count("textenv:") == 1 and "rank 0: run is in use by" in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_is_passed_on(number, expected, home, monkeypatch, capfd):
    """Once: the iteration is finished and saved. The run then goes on, in four processes, to its end."""
    words = ["train", *settings("small", "run", 60)]
    timer = after_rows(home, 2, lambda: os.kill(os.getpid(), number))
    code, _, said, seconds = run(home, monkeypatch, capfd, *words)
    timer.join()
    assert code == expected and seconds < 60, said
    assert said.count("stopping when this iteration is done and saved") == 1
    assert len(re.findall(r"textenv: stopped after [\d,]+ tokens, saved; continue with", said)) == 1
    n = len(rows(home / "run")) + 1
    code, _, said, _ = run(
        home, monkeypatch, capfd, "train", "--resume", "run", f"--total_tokens={n * ROLLOUT}", size=4, fault=None
    )
    assert code == 2 and "--change total_tokens" in said


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(home, monkeypatch, capfd):
    def twice():
        for _ in range(2):
            if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # else the launcher has ended
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    timer = after_rows(home, 2, twice)
    code, _, said, seconds = run(home, monkeypatch, capfd, "train", *settings("small", "run", 6000))
    timer.join()
    assert code == 130 and seconds < 60
    # The first Ctrl-C may have ended the run already, if an iteration took less than the pause between the two.
    assert said.count("stopped at once; ") + said.count("textenv: stopped after") == 1, said


def after_rows(home, n, act):
    """Do something once a run has written `n` rows, in a thread; return the thread."""

    def wait():
        file, limit = home / "run" / "metrics.jsonl", time.monotonic() + 100
        while not file.is_file() or len(file.read_text().splitlines()) < n:
            assert time.monotonic() < limit
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_variables_of_a_launcher_that_is_not_there(home):
    """WORLD_SIZE is left over from something else, or another program has the port."""
    no_address = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": str(free_port())}
    ((code, _, said),) = launch(1, "run_command", train(), environments={0: no_address})
    assert code == 2 and said.count("\n") == 1 and "Expected MASTER_ADDR, the host of rank 0" in said
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ((code, _, said),) = launch(1, "run_command", train(), environments={0: taken})
    assert code == 2 and said.count("\n") == 1 and f"textenv: rank 0: Expected to open 127.0.0.1:{port}" in said
