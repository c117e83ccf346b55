"""Signals, closed terminals and broken pipes: the run is saved, and its exit code says how it ended."""

import errno
import os
import pty
import select
import signal
import sys
import termios
import time

import pytest

from agents import signals as interrupts
from agents.checkpoints.checkpoint import latest_checkpoint
from agents.runs.recording import Recorder
from agents.signals import Interrupts, KeptStream
from tests.helpers.command import ROLLOUT, environment, rows, run, settings, start, wait_for_rows

LONG = 100_000


class Gone:
    """A stream whose reader disappears after `left` writes; then each write raises error `number`."""

    def __init__(self, number, left=0):
        self.number, self.left, self.tried = number, left, 0

    def write(self, text):
        self.tried += 1
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))
        self.left -= 1

    def flush(self):
        self.write("")

    def isatty(self):
        return False

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 129), (errno.EPIPE, 141)])
def test_output_that_is_gone_ends_the_run_once_it_is_saved(number, code, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone(number, left=10))
    assert run("train", *settings(model, tmp_path / "run", rollouts=9)) == code
    saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert 0 < int(saved.name[5:]) == rows(tmp_path / "run")[-1]["tokens"] < 9 * ROLLOUT


def test_a_terminal_hangs_up_twice_and_the_run_is_still_saved(model, tmp_path, monkeypatch, capfd):
    original, sent = Recorder._on_step, []

    def step(self):
        if len(sent) < 3:
            sent.append(os.kill(os.getpid(), signal.SIGHUP))
        return original(self)

    monkeypatch.setattr(Recorder, "_on_step", step)
    assert run("train", *settings(model, tmp_path / "run"), "--quiet") == 129
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == f"step_{ROLLOUT:012d}"
    assert f"textenv train --resume {tmp_path / 'run'}" in capfd.readouterr().err


def test_which_signals_are_noted_and_which_end_it():
    lines, ended = [], []
    before = [signal.getsignal(number) for number in interrupts.WATCHED]
    with Interrupts(lines.append, "step", ended.append) as noted:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert noted.number == signal.SIGHUP and not ended
        assert lines == ["stopping when this step is done and saved; once more stops at once"]
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]
    assert [signal.getsignal(number) for number in interrupts.WATCHED] == before


def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert noted.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stream_that_is_gone_is_told_once_and_other_errors_are_raised():
    reading, writing = os.pipe()
    lost = []
    with os.fdopen(writing, "w") as stream:
        kept = KeptStream(stream, lost.append)
        os.close(reading)
        for _ in range(3):
            assert kept.write("a line\n") == 7
            kept.flush()
    assert lost == [signal.SIGPIPE]
    full = Gone(errno.ENOSPC)
    KeptStream(full, lost.append).write("x")
    assert full.tried == 1 and len(lost) == 1
    with pytest.raises(OSError, match="Bad file"):
        KeptStream(Gone(errno.EBADF), lost.append).write("x")


@pytest.mark.slow
def test_a_real_pipe_whose_reader_ends(model, tmp_path):
    with start("train", *settings(model, tmp_path / "run", rollouts=LONG)) as process:
        wait_for_rows(process, tmp_path / "run", 3)
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 141
    assert f"textenv train --resume {tmp_path / 'run'}" in error and "Traceback" not in error
    assert int(latest_checkpoint(tmp_path / "run" / "checkpoints").name[5:]) == rows(tmp_path / "run")[-1]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "sft"])
def test_a_real_terminal_that_is_closed(verb, model, tmp_path):
    """The process gets SIGHUP, and its writes then fail with EIO."""
    out = tmp_path / "run"
    if verb == "train":
        words = ["train", *settings(model, out, rollouts=LONG)]
    else:
        (tmp_path / "texts.txt").write_text("this phone is great .\n" * 50)
        words = ["sft", f"--model={model}", f"--data={tmp_path / 'texts.txt'}", f"--out={out}", "--n_epochs=100000"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "agents.cli", *map(str, words)], environment())
    termios.tcsetwinsize(terminal, (24, 80))  # in a terminal of size 0, which is what `fork` makes, bars are blank
    shown, limit = b"", time.monotonic() + 100
    while not is_training(verb, out, shown) and time.monotonic() < limit:
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129, shown
    if verb == "train":
        assert int(latest_checkpoint(out / "checkpoints").name[5:]) == rows(out)[-1]["tokens"] > 0
    else:
        assert list((tmp_path / ".run.training").glob("checkpoint-*/manifest.json")) and not out.exists()


def is_training(verb, out, shown):
    if verb == "train":
        return (out / "metrics.jsonl").is_file() and len(rows(out)) > 3
    return b"loss=" in shown
