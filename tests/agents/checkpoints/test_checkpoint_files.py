"""Checkpoint files: damaged, foreign, half-written and pruned ones. A model is loaded entirely or not at all (E8)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback

from agents import KLPenalty
from agents.callbacks.checkpoints import Checkpoints
from agents.checkpoints.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from agents.checkpoints.manifest import CheckpointError, newest_intact, verify_checkpoint
from agents.files import replaced_folder
from tests.helpers.training import PROMPTS, run_state, tiny_agent, tiny_config, tiny_env
from textenv import TextEnv


def build(**kwargs):
    return tiny_agent(tiny_env(max_new_tokens=7), **{"n_steps": 5, "n_epochs": 1, **kwargs})


# Damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that tests copy before they damage it."""
    model = build()
    model.learn(40, callback=KLPenalty(0.1))
    return save_checkpoint(model, tmp_path_factory.mktemp("run") / "saved")


@pytest.fixture(scope="module")
def victim():
    """Another trained model, into which nothing damaged may be loaded."""
    model = build(seed=5)
    model.learn(20, callback=KLPenalty(0.1))
    return model


def copied(saved, folder):
    folder.mkdir(parents=True)
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


FILES = ("policy.safetensors", "optimizer.safetensors", "episodes.safetensors", "waiting.safetensors")
FILES += ("generators.safetensors", "probe.safetensors", "step_KLPenalty.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_file_is_named_and_the_model_left_unchanged(name, damage, saved, victim, tmp_path):
    folder = copied(saved, tmp_path / "run" / "step_9")
    damage(folder / name)
    before = run_state(victim)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_checkpoint(victim, folder)
    assert run_state(victim) == before
    assert latest_checkpoint(tmp_path / "run") is None


def test_the_message_says_what_is_there_and_what_was_expected(saved, tmp_path):
    folder = copied(saved, tmp_path / "saved")
    size = (folder / "policy.safetensors").stat().st_size
    cut(folder / "policy.safetensors")
    with pytest.raises(CheckpointError, match=rf"policy.safetensors: {size // 2} bytes, manifest says {size}"):
        verify_checkpoint(folder)
    (folder / "policy.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"policy.safetensors: missing, manifest says {size}"):
        verify_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"Expected a checkpoint in .*nowhere, got no manifest.json"):
        verify_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("format", "cure"), [(99, "install a newer textenv"), (1, "only the textenv that wrote it reads it")]
)
def test_another_format_is_refused(format, cure, saved, tmp_path):
    folder = copied(saved, tmp_path / "saved")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": format}))
    with pytest.raises(CheckpointError, match=rf"Expected format 3 in .*manifest\.json, got {format}: {cure}"):
        load_checkpoint(build(), folder)


@pytest.mark.parametrize(
    ("kwargs", "env", "message"),
    [
        ({"lm": tiny_config(n_embd=32)}, {}, "the weights of the model that was saved, got others"),
        ({"lm": tiny_config(n_layer=1)}, {}, "the weights of the model that was saved, got others"),
        ({"algorithm": A2C, "use_rms_prop": True}, {}, "the optimizer that was saved, got RMSprop"),
        ({"n_envs": 8}, {}, "running episodes of shape .*same n_envs"),
        ({}, {"max_new_tokens": 9}, "running episodes of shape .*max_new_tokens"),
        ({}, {"prompts": [*PROMPTS, "m"]}, "the 5 prompts of the saved run, got 6"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(kwargs, env, message, saved):
    model = tiny_agent(tiny_env(**{"max_new_tokens": 7, **env}), **{"n_steps": 5, **kwargs})
    model.learn(40)
    before = run_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, saved)
    assert run_state(model) == before


# Writing


def test_saving_inside_a_rollout_is_refused(tmp_path):
    """Also at a rollout's first step, when the buffer is still empty, and at its end, before the update."""

    class Saves(BaseCallback):
        def _on_step(self):
            self._try()
            return True

        def _on_rollout_end(self):
            self._try()

        def _try(self):
            with pytest.raises(RuntimeError, match=r"between (iterations|rollouts)"):
                save_checkpoint(self.model, tmp_path / "saved")

    model = build()
    with pytest.raises(RuntimeError, match="after `reset`"):
        save_checkpoint(model, tmp_path / "saved")
    model.learn(40, callback=Saves())
    assert not list(tmp_path.iterdir())
    save_checkpoint(model, tmp_path / "saved")


@pytest.mark.parametrize("where", ["save_file", "json", "fsync", "first rename", "second rename"])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(where, tmp_path, monkeypatch):
    model = build()
    model.learn(20)
    saved = save_checkpoint(model, tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    model.learn(20)
    with monkeypatch.context() as patch:
        break_at(patch, where, failure)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(model, saved, overwrite=True)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert list(tmp_path.iterdir()) == [saved]
    save_checkpoint(model, saved, overwrite=True)
    assert list(tmp_path.iterdir()) == [saved]
    load_checkpoint(model, saved)


def failure():
    raise OSError("disk full")


def break_at(patch, where, action):
    """Make a save fail or die at one call: `action` replaces the third `save_file`, the first rename, ..."""
    targets = {"save_file": (safetensors.torch, "save_file", 3), "json": (json, "dumps", 1), "fsync": (os, "fsync", 2)}
    targets |= {"first rename": (Path, "rename", 1), "second rename": (Path, "rename", 2)}
    module, name, number = targets[where]
    original, calls = getattr(module, name), []

    def breaks(*args, **kwargs):
        calls.append(args)
        return action() if len(calls) == number else original(*args, **kwargs)

    patch.setattr(module, name, breaks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("where", ["save_file", "json", "fsync", "first rename", "second rename"])
def test_kill_9_inside_a_save_leaves_a_checkpoint_that_loads(where, tmp_path, monkeypatch):
    model = build()
    model.learn(20)
    folder = tmp_path / "saved"
    save_checkpoint(model, folder)
    model.learn(20)
    child = os.fork()
    if child == 0:  # never returns into pytest
        try:
            break_at(monkeypatch, where, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save_checkpoint(model, folder, overwrite=True)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    latest = latest_checkpoint(tmp_path)
    assert verify_checkpoint(latest) == 20
    load_checkpoint(build(), latest)
    save_checkpoint(model, folder, overwrite=True)  # the next save removes what was left over
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_killed_process_had_put_aside_comes_back(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".saved.old-{dead.pid}").mkdir()
    (tmp_path / f".saved.old-{dead.pid}" / "file").write_text("old")
    (tmp_path / f".saved.partial-{os.getppid()}").mkdir()  # belongs to a process that still runs
    with pytest.raises(OSError, match="disk full"), replaced_folder(tmp_path / "saved"):
        failure()
    assert (tmp_path / "saved" / "file").read_text() == "old"
    assert (tmp_path / f".saved.partial-{os.getppid()}").is_dir()


def test_memory_that_json_would_change_is_refused(tmp_path):
    class Forgets(TextEnv):
        def get_reward(self, prompt, preds, done):
            preds.state[1] = 2
            return 0.0

    model = tiny_agent(tiny_env(cls=Forgets, stop_ids=()), n_steps=6)
    model.learn(24)
    with pytest.raises(TypeError, match=r"Expected `preds.state` to hold what JSON brings back"):
        save_checkpoint(model, tmp_path / "saved")


# The callback


def test_checkpoints_every_so_often_and_the_newest_kept(tmp_path):
    model = build()
    model.learn(20 * 7, callback=Checkpoints(tmp_path, every=2, keep=2))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000000120", "step_000000000140"]
    assert latest_checkpoint(tmp_path).name == "step_000000000140"
    cut(tmp_path / "step_000000000140" / "policy.safetensors")
    assert latest_checkpoint(tmp_path).name == "step_000000000120"
    by_name, by_manifest = newest_intact(tmp_path), newest_intact(tmp_path, name=None)
    assert by_name == by_manifest and "policy.safetensors: " in by_name[1][0]
    cut(tmp_path / "step_000000000140" / "manifest.json")
    by_name, by_manifest = newest_intact(tmp_path), newest_intact(tmp_path, name=None)
    assert by_name == by_manifest and "manifest.json" in by_name[1][0]
    assert latest_checkpoint(tmp_path / "step_000000000120") is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_what_was_saved_last_is_never_pruned(tmp_path):
    """Not even where the folder has a damaged checkpoint of a higher step."""
    (tmp_path / "step_000000999999").mkdir()
    model = build()
    model.learn(60, callback=Checkpoints(tmp_path, every=1, keep=1))
    assert latest_checkpoint(tmp_path).name == "step_000000000060"


def test_training_that_stops_inside_a_rollout_keeps_the_last_checkpoint(tmp_path):
    class Stops(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 48

    model = build()
    with pytest.warns(UserWarning, match="stopped inside a rollout"):
        model.learn(200, callback=[Stops(), Checkpoints(tmp_path, every=1)])
    assert latest_checkpoint(tmp_path).name == "step_000000000040"


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}])
def test_bad_options_of_the_callback(options, tmp_path):
    with pytest.raises(ValueError, match="Expected `every` and `keep` to be at least 1"):
        Checkpoints(tmp_path, **options)
