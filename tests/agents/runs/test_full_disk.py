"""A disk that is full for a while: rows, events and checkpoints wait, training continues, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import safetensors.torch

from agents import files
from agents.checkpoints.storage import explain
from agents.runs.exit_codes import as_command_error
from agents.runs.folder import append_text
from agents.runs.loggers import TensorBoard
from agents.runs.recording import Recorder
from tests.helpers.command import ROLLOUT, rows, run, same_runs, settings

ROLLOUTS = 6


@pytest.fixture
def disk(monkeypatch):
    """A switch, `disk[0]`: while it is true, `os.fsync` and safetensors raise ENOSPC."""
    full = [False]
    fsync, save_file = os.fsync, safetensors.torch.save_file

    def check(call):
        def checked(*args, **kwargs):
            if full[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return checked

    monkeypatch.setattr(os, "fsync", check(fsync))
    monkeypatch.setattr(safetensors.torch, "save_file", check(save_file))
    return full


def full_between(monkeypatch, disk, first, last):
    """Let the disk be full from the end of rollout `first` until the end of rollout `last`."""
    original = Recorder._on_step

    def step(self):
        disk[0] = first * ROLLOUT <= self.model.num_timesteps < last * ROLLOUT
        return original(self)

    monkeypatch.setattr(Recorder, "_on_step", step)


@pytest.mark.slow
def test_what_waits_for_room_is_all_there_in_the_end(model, tmp_path, disk, monkeypatch, capfd):
    pytest.importorskip("tensorboard", reason="needs tensorboard, an extra")
    words = {"loggers": "[tensorboard]", "evaluation.every": 100 * ROLLOUT}
    assert run("train", *settings(model, tmp_path / "whole", ROLLOUTS, **words), "--quiet") == 0
    full_between(monkeypatch, disk, 1, 4)
    assert run("train", *settings(model, tmp_path / "full", ROLLOUTS, **words)) == 0
    same_runs(tmp_path / "whole", tmp_path / "full")
    said = capfd.readouterr().out
    assert re.search(
        rf"Rows could not be written, and wait: .* free at {tmp_path}/full/(tokens|metrics)\.jsonl \(No space", said
    )
    assert "needs 0.0 MB" not in said
    assert len(list((tmp_path / "full" / "checkpoints").iterdir())) == 3
    assert not [path for path in (tmp_path / "full").rglob(".*") if "partial" in path.name]


def test_a_checkpoint_says_what_it_needs_and_is_tried_again(model, tmp_path, disk, monkeypatch, capfd):
    """The rows are written; the checkpoint is not, and names its own path."""
    original, tried = safetensors.torch.save_file, []

    def fails_once(*args, **kwargs):
        tried.append(args[1])
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", fails_once)
    assert run("train", *settings(model, tmp_path / "run", 3, checkpoint_every=2)) == 0
    prefix = f"{tmp_path}/run/checkpoints/step_"
    assert re.search(rf"checkpoint could not be written: needs .* MB, .* free at {prefix}", capfd.readouterr().out)


@pytest.mark.slow
def test_an_evaluation_that_could_not_be_kept_is_made_again(model, tmp_path, disk, monkeypatch, capfd):
    words = settings(model, tmp_path / "run", 5, **{"evaluation.every": 2 * ROLLOUT})
    full_between(monkeypatch, disk, 1, 3)
    assert run("train", *words) == 0
    said = capfd.readouterr().out
    assert f"The evaluation at {2 * ROLLOUT} tokens could not be kept" in said and "made again" in said
    history = [row["num_timesteps"] // ROLLOUT for row in json.loads((tmp_path / "run" / "history.json").read_text())]
    assert history == [0, 3, 5]
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["num_timesteps"] // ROLLOUT in history


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_with_5_and_keeps_what_was(model, tmp_path, disk, monkeypatch, capfd):
    full_between(monkeypatch, disk, 2, 99)
    out = tmp_path / "run"
    assert run("train", *settings(model, out, 4, **{"evaluation.every": 100 * ROLLOUT})) == 5
    said = capfd.readouterr().err
    assert "No space left on device" in said and str(out) in said and said.count("\n") == 1
    disk[0] = False
    monkeypatch.undo()
    assert run("train", "--resume", out, "--quiet") == 0
    assert [row["tokens"] // ROLLOUT for row in rows(out)] == [0, 1, 2, 3, 4]


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    file = tmp_path / "rows"
    append_text(file, "first\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full") as error:
            append_text(file, "second\n")
    assert file.read_text() == "first\n" and error.value.filename == str(file)
    append_text(file, "second\n")
    assert file.read_text() == "first\nsecond\n"


def test_a_log_that_cannot_be_written_does_not_replace_the_cause(model, tmp_path, monkeypatch, capfd):
    (tmp_path / "broken.py").write_text(
        "class Broken:\n    def __call__(self, prompt, preds, done):\n        raise KeyError('the cause')\n"
    )
    monkeypatch.chdir(tmp_path)
    opened = Path.open

    def full(self, *args, **kwargs):
        if self.name == "log.txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    words = settings(model, tmp_path / "run", **{"env.reward": "broken:Broken"})
    assert run("train", *words, "--allow", "broken", "--quiet") == 4
    error = capfd.readouterr().err
    assert "the cause" in error and "traceback is in" not in error and "No space" not in error


def test_the_path_that_is_full_is_named_with_its_own_room(tmp_path, monkeypatch):
    asked = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage._replace(free=25e8))
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "not" / "there" / "yet"))
    known = as_command_error(error, Path("/elsewhere"))
    assert (known.code, str(known)) == (5, f"2.5 GB free at {tmp_path}/not/there/yet (No space left on device).")
    assert explain(error, "/", 12 * 10**8).startswith("needs 1.2 GB, 2.5 GB free at")
    assert asked == [tmp_path, tmp_path]
    failed = safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    with pytest.raises(OSError, match="No space left on device") as raised, files.naming(tmp_path):
        raise failed
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_events_that_wait_are_in_the_next_file(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard, an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import record_writer

    original, full = record_writer.RecordWriter.write, [False]

    def write(self, data):
        if full[0]:
            raise OSError(errno.ENOSPC, "full")
        return original(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", lambda ended: None)  # TensorBoard's writer thread dies, as in a run
    writer = TensorBoard(str(tmp_path))
    for step in range(6):
        full[0] = 2 <= step < 4
        writer.write({"x": float(step)}, {"x": None}, step)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("x")
    assert [(event.step, event.value) for event in events] == [(step, float(step)) for step in range(6)]


@pytest.mark.slow
def test_a_real_disk_that_is_full_for_a_while(model, tmp_path, monkeypatch, capfd):
    out = tmp_path / "disk"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", out], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        assert run("train", *settings(model, tmp_path / "whole", ROLLOUTS, loggers="[tensorboard]"), "--quiet") == 0
        original = Recorder._on_step

        def step(self):
            at = self.model.num_timesteps // ROLLOUT
            ballast = out / "ballast"
            if 1 <= at < 3 and not ballast.exists():
                with ballast.open("wb", buffering=0) as stream:
                    try:
                        while stream.write(b"x" * 4096):
                            pass
                    except OSError:
                        pass
            elif at >= 3:
                ballast.unlink(missing_ok=True)
            return original(self)

        monkeypatch.setattr(Recorder, "_on_step", step)
        words = settings(model, out / "run", ROLLOUTS, loggers="[tensorboard]", keep_checkpoints=2)
        assert run("train", *words) == 0
        said = capfd.readouterr()
        assert re.search(rf"0\.0 MB free at {out}/run/.* \(No space left", said.out) and "Traceback" not in said.err
        assert (out / "run" / "model" / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "model" / "model.safetensors"
        ).read_bytes()
        names = ("reward/task", "tokens", "train/loss")
        pair = [
            [[row.get(name) for name in names] for row in rows(folder)] for folder in (tmp_path / "whole", out / "run")
        ]
        assert pair[0] == pair[1]
    finally:
        subprocess.run(["umount", out], check=True)
