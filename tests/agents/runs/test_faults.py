"""Faults that a run survives or refuses: signals, unusable folders, half-written files, and hostile text."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from agents import files, save_checkpoint
from agents.checkpoints.checkpoint import latest_checkpoint, save_step
from agents.checkpoints.manifest import CheckpointError, verify_checkpoint
from agents.configuration.config import TrainConfig
from agents.errors import CommandError
from agents.runs import train as training_run
from agents.runs.folder import RunFolder
from agents.runs.model_card import model_card
from agents.runs.recording import Recorder
from agents.runs.screens import PlainScreen
from tests.helpers.command import ROLLOUT, run, settings
from tests.helpers.training import tiny_agent
from textenv import Prompt
from textenv.text.printable import printable

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e<script>alert(1)</script>"


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_iteration_saves_and_has_its_code(number, code, model, tmp_path, monkeypatch, capfd):
    original, sent = Recorder._on_step, []

    def step(self):
        if not sent:
            sent.append(os.kill(os.getpid(), number))
        return original(self)

    monkeypatch.setattr(Recorder, "_on_step", step)
    assert run("train", *settings(model, tmp_path / "run"), "--quiet") == code
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == f"step_{ROLLOUT:012d}"
    assert f"textenv train --resume {tmp_path / 'run'}" in capfd.readouterr().err


# Folders


@pytest.mark.parametrize("verb", ["new", "resume"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_loads(
    verb, model, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "run"
    if verb == "resume":
        assert run("train", *settings(model, out, rollouts=1), "--quiet") == 0
    opened = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and out in self.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(training_run, "assemble", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    words = ["--resume", out] if verb == "resume" else settings(model, out)
    assert run("train", *words, "--quiet") == 2
    assert f"Expected a folder to write to, got {out}: Read-only file system" in capfd.readouterr().err


def hold(path, ready, done):
    with RunFolder(path).locked():
        ready.set()
        done.wait(60)


def test_two_processes_do_not_share_a_folder_and_a_killed_one_frees_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(CommandError, match=f"in use by pid {other.pid} since 2") as error, RunFolder(tmp_path).locked():
        pass
    assert error.value.code == 2
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with RunFolder(tmp_path).locked():
        pass


def test_a_run_name_stays_in_its_folder_and_no_folder_is_taken_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("../../evil", "/etc/evil", "a/../../b", ".."):
        folder = RunFolder.create(None, name).path.resolve()
        assert folder.parent == tmp_path / "runs"
    monkeypatch.setattr("agents.runs.folder.secrets.token_hex", lambda n: "00")
    monkeypatch.setattr("agents.runs.folder.datetime", Fixed)
    RunFolder.create(None, "same")
    with pytest.raises(CommandError, match="File exists"):
        RunFolder.create(None, "same")


class Fixed:
    @staticmethod
    def now(zone):
        from datetime import datetime

        return datetime(2026, 1, 1, tzinfo=zone)


# Writing


def test_the_order_of_writing(tmp_path, monkeypatch):
    """First every file and the folder are synced, then renamed, then the parent is synced, then older ones removed."""
    model, events = tiny_agent(), []
    model.learn(16)
    save_step(model, tmp_path, keep=1)
    model.learn(16, reset_num_timesteps=False)
    sync, rename, rmtree = files.sync, Path.rename, shutil.rmtree

    def note_sync(path):
        events.append(("sync", path.name))
        sync(path)

    def note_rename(self, target):
        events.append(("rename", Path(target).name))
        return rename(self, target)

    def note_remove(path, **kwargs):
        events.append(("remove", Path(path).name))
        rmtree(path, **kwargs)

    monkeypatch.setattr(files, "sync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(shutil, "rmtree", note_remove)
    newest = save_step(model, tmp_path, keep=1)
    events = [event for event in events if event[0] != "remove" or event[1].startswith("step_")]
    renamed = events.index(("rename", newest.name))
    written = {path.name for path in newest.iterdir()}
    assert written <= {name for kind, name in events[:renamed] if kind == "sync"}
    assert events[renamed - 1] == ("sync", f".{newest.name}.partial-{os.getpid()}")
    assert events[renamed + 1 :] == [("sync", tmp_path.name), ("remove", "step_000000000016")]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["format"] == 3 and manifest["num_timesteps"] == 32 and "torch" in manifest["versions"]
    assert written - {"manifest.json"} == manifest["files"].keys()
    assert all(entry.keys() == {"size", "sha256"} for entry in manifest["files"].values())


def test_nothing_is_pruned_for_a_checkpoint_that_does_not_verify(tmp_path, monkeypatch):
    model = tiny_agent()
    model.learn(16)
    first = save_step(model, tmp_path, keep=1)
    model.learn(16, reset_num_timesteps=False)
    sync = files.sync

    def spoil(path):
        sync(path)
        if path.name == "policy.safetensors":
            path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(files, "sync", spoil)
    with pytest.raises(OSError, match=r"policy\.safetensors: \d+ bytes, manifest says"):
        save_step(model, tmp_path, keep=1)
    verify_checkpoint(first)
    assert latest_checkpoint(tmp_path) == first


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    model = tiny_agent()
    model.learn(16)
    with torch.no_grad():
        next(model.policy.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="Expected finite weights to save"):
        save_checkpoint(model, tmp_path / "saved")
    assert not any(tmp_path.iterdir())
    with pytest.raises(CheckpointError):
        verify_checkpoint(tmp_path / "saved")


# Hostile text


def is_harmless(shown):
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)


def test_escape_codes_are_shown_on_the_terminal(model, tmp_path, monkeypatch, capfd):
    assert is_harmless(printable(HOSTILE)) and "\\x1b[2J" in printable(HOSTILE)
    PlainScreen(10, 10).say(f"warning: {HOSTILE}")
    assert is_harmless(capfd.readouterr().out)
    (tmp_path / "loud.py").write_text(
        f"class Loud:\n    def __call__(self, prompt, preds, done):\n        raise ValueError({HOSTILE!r})\n"
    )
    monkeypatch.chdir(tmp_path)
    words = settings(model, tmp_path / "run", **{"env.reward": "loud:Loud"})
    assert run("train", *words, "--allow", "loud", "--quiet") == 4
    assert is_harmless(error := capfd.readouterr().err) and "\\x1b[2J" in error


def test_lines_of_json_have_no_control_codes(model, tmp_path, monkeypatch, capfd):
    from agents.cli import trained_model as verbs

    class One:
        prompt, text, end_reason = Prompt("p"), HOSTILE, "eos"

    monkeypatch.setattr(verbs, "generate", lambda *args, **kwargs: [One])
    (tmp_path / "p.txt").write_text("this phone is\n")
    assert run("generate", model, "--prompts", tmp_path / "p.txt") == 0
    shown = capfd.readouterr().out
    assert is_harmless(shown) and json.loads(shown)["text"] == HOSTILE


def test_the_card_has_no_markup_of_others():
    config = TrainConfig()
    config.model.name, config.env.id, config.license = f"x{HOSTILE}", f"y{HOSTILE}", f"mit\nextra: {HOSTILE}"
    config.env.args = {"text": f"```\n{HOSTILE}"}
    about = {"versions": {"torch": HOSTILE}, "git": {"textenv": None}}
    card = model_card(config, about, "| figure |")
    _, fields, body = card.split("---\n", 2)
    assert yaml.safe_load(fields).keys() == {"license", "library_name", "base_model", "tags"}
    assert "<script>" not in body[: body.index("```json")] and body.count("```") == 2
    assert is_harmless(card)
