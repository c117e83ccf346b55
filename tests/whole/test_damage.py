"""Damaged and half-replaced files: the newest intact checkpoint is used, or the error names the file."""

import json
import math
import os
import random
import shutil
import signal

import pytest

from agents import Evaluate, files
from agents.checkpoints.manifest import CheckpointError, newest_intact, numbered, verify_checkpoint
from agents.runs import train as training_run
from tests.helpers.command import ROLLOUT, in_a_fork, rows, run, settings
from tests.helpers.training import PROMPTS, TOKENIZER, tiny_agent
from textenv.huggingface.weights import readable

DEAD = 99_999_999  # no process has this id


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run("train", *settings(model, out, 2), "--quiet") == 0
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


# Manifests


def test_no_flip_of_a_manifest_goes_unnoticed(copy):
    """Flip one bit, 400 times: where the content changes, the checkpoint before it is used."""
    before, newest = sorted((copy / "checkpoints").iterdir())
    content, rng, noticed = (newest / "manifest.json").read_bytes(), random.Random(0), 0
    for _ in range(400):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (newest / "manifest.json").write_bytes(flipped)
        intact, damage = newest_intact(copy / "checkpoints")
        if intact == newest:
            assert json.loads(flipped) == json.loads(content), "another manifest was taken"
        else:
            assert intact == before and str(newest) in damage[0]
            noticed += 1
    assert noticed > 300


@pytest.mark.parametrize(
    "made",
    [{}, [], None, 5, "x", {"format": 1}, {"format": 2}, {"format": "2", "num_timesteps": 5, "files": {}}]
    + [{"format": 2, "num_timesteps": 5, "versions": {}, "files": files} for files in ({}, [], {"a": None}, {"a": {}})],
)
def test_a_manifest_made_by_hand_is_passed_over(made, copy, capfd):
    before, newest = sorted((copy / "checkpoints").iterdir())
    (newest / "manifest.json").write_text(json.dumps(made))
    assert newest_intact(copy / "checkpoints")[0] == before
    with pytest.raises(CheckpointError, match=r"^Expected .* in .*manifest\.json, got "):
        verify_checkpoint(newest)


def test_other_folders_among_the_checkpoints_are_none(copy):
    for name in ("step_", "step_x", "step_9z", "steps_12", "step_٣"):
        (copy / "checkpoints" / name).mkdir()
    assert len(numbered(copy / "checkpoints")) == 2
    assert run("train", "--resume", copy, "--quiet") == 0


# Files of a run's folder


@pytest.mark.parametrize(
    ("name", "text", "verb", "message"),
    [
        ("run.json", "[]", "compare", "Expected an object in {}, got []"),
        ("run.json", '{"format": 1}', "compare", "Expected an object as `versions` in {}, got nothing"),
        ("run.json", "\xff", "compare", "Expected JSON in {}, got bytes that are no UTF-8"),
        ("vocabulary.json", "[]", "resume", "Expected an object in {}, got []"),
        ("history.json", "{}", "resume", "Expected a list in {}, got {{}}"),
        ("history.json", "[]", "resume", "Expected at least one evaluation in {}, got none"),
        ("history.json", '[{"num_timesteps": 0}]', "resume", "Expected an object as `[0].figures` in {}, got nothing"),
        ("scores.json", "[{}]", "compare", "Expected a whole number as `[0].num_timesteps` in {}, got nothing"),
        (
            "metrics.jsonl",
            '{"tokens": "1"}\n',
            "resume",
            "Expected a whole number as `tokens` in line 1 of {}, got '1'",
        ),
        ("metrics.jsonl", "{\n", "compare", "Expected JSON in line 1 of {}, got '{{'"),
        ("metrics.jsonl", "\xff\n", "compare", "Expected lines of JSON in {}, got bytes that are no UTF-8"),
        ("samples.jsonl", '{"tokens": 1}\n', "resume", "Expected a text as `prompt` in line 1 of {}, got nothing"),
        ("results.json", '{"after": []}', "export", "Expected an object as `after` in {}, got []"),
    ],
)
def test_a_file_of_a_run_that_is_damaged_is_named(name, text, verb, message, copy, tmp_path, capfd):
    (copy / name).write_bytes(text.encode("latin1"))
    words = {
        "resume": ["train", "--resume", copy],
        "export": ["export", copy, tmp_path / "to"],
        "compare": ["compare", copy, copy, "--out", tmp_path / "compare.png"],
    }
    assert run(*words[verb]) == 2
    assert not (tmp_path / "to").exists() and not (tmp_path / "compare.png").exists()
    error = capfd.readouterr().err.splitlines()[-1]
    assert message.format(copy / name) in error and "Traceback" not in error


def test_a_line_of_a_text_with_other_ends_of_lines_is_one_line(copy):
    row = json.loads((copy / "samples.jsonl").read_text().splitlines()[0])
    text = json.dumps({**row, "text": "a\u2028b\x85c\u2029"}, ensure_ascii=False)
    (copy / "samples.jsonl").write_text(text + "\n" + text[:20])
    assert [row["text"] for row in training_run.read_rows(copy / "samples.jsonl", object)] == ["a\u2028b\x85c\u2029"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.safetensors", None, "Expected to load {}, got SafetensorError: "),
        ("tokenizer.json", "{}", "Expected an object as `model` in {}, got nothing"),
        ("tokenizer_config.json", "[]", "Expected an object in {}, got []"),
        ("config.json", "null", "Expected an object in {}, got None"),
        ("generation_config.json", "[1]", "Expected an object in {}, got [1]"),
    ],
)
def test_a_file_of_a_model_that_is_damaged_is_named(name, text, message, model, tmp_path, capfd):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / name).write_bytes(text.encode() if text else (folder / name).read_bytes()[:-9])
    (tmp_path / "p.txt").write_text("this phone is\n")
    assert run("generate", folder, "--prompts", tmp_path / "p.txt") == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("textenv: ")]
    assert message.format(folder / name) in line


def test_what_transformers_says_itself_is_left_as_it_is(tmp_path):
    with pytest.raises(OSError, match="no such model"), readable("a/name"):
        raise OSError("no such model")
    with pytest.raises(ValueError, match=r"Expected to load .*name, got KeyError: 'added'"), readable("a/name"):
        raise KeyError("added")


# Between two renames


def killed_between_renames(folder):
    """Leave a folder as a process killed while replacing it does: the old one aside, the new one not yet there."""
    folder.rename(folder.with_name(f".{folder.name}.old-{DEAD}"))
    (folder.with_name(f".{folder.name}.partial-{DEAD}")).mkdir()


def test_the_best_model_that_was_put_aside_comes_back(tmp_path):
    agent = tiny_agent()
    words = {"every": 16, "folder": tmp_path, "reward": lambda *_: 0.5, "max_new_tokens": 1, "patience": 9}
    agent.learn(16, callback=Evaluate(PROMPTS, TOKENIZER, **words))
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    killed_between_renames(tmp_path / "best")
    again = Evaluate(PROMPTS, TOKENIZER, **words)
    agent.learn(16, callback=again, reset_num_timesteps=False)
    assert (again.best_value, again.best_at) == (best["value"], 0)
    assert len(again.history) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "history.json", "scores.json"]


def test_patience_does_not_run_out_because_somebody_has_removed_the_best_model(tmp_path):
    scores = iter([0.0, 1.0, 0.5, 0.5, 0.5])
    again = Evaluate(PROMPTS, TOKENIZER, every=1, folder=tmp_path, patience=3)
    agent = tiny_agent()
    again._measure = lambda now: measured(again, now, next(scores))
    again._keep = lambda folder, result: folder.mkdir(exist_ok=True)
    agent.learn(32, callback=again)
    assert list(again.history) == [0, 16, 32] and again.best_at == 16
    (tmp_path / "best").rmdir()
    with pytest.warns(UserWarning, match=r"best is gone: the best model, of 16 tokens, is lost"):
        agent.learn(16, callback=again, reset_num_timesteps=False)
    assert again.best_at == 16 and not again.is_over and agent.num_timesteps == 48


def measured(callback, now, score):
    callback.history[now] = {"reward": score}
    if score > callback.best_value:
        callback.best_value, callback.best_at = score, now


def test_a_start_puts_back_what_was_put_aside_in_a_run(copy, whole):
    for folder in (copy / "best", copy / "model", sorted((copy / "checkpoints").iterdir())[-1]):
        killed_between_renames(folder)
    assert run("train", "--resume", copy, "--quiet") == 0
    assert not [path for path in copy.rglob(".*-*") if "partial" in path.name or "old" in path.name]
    assert {path.name for path in copy.rglob("*")} == {path.name for path in whole.rglob("*")}


@pytest.mark.slow
def test_kill_9_between_the_renames_of_best_leaves_a_run_that_goes_on(model, tmp_path, monkeypatch):
    """The resumed run restores `best/`, trains to its end, and writes the figures and the model of an unbroken run."""
    more = {"evaluation.patience": 3, "evaluation.every": ROLLOUT, "algorithm.learning_rate": 3e-2}
    assert run("train", *settings(model, tmp_path / "whole", 6, **more), "--quiet") == 0
    original = files.Path.rename

    def dies(self, target):
        if self.name.startswith(".best.partial") and list(self.parent.glob(".best.old-*")):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, target)

    out, n_killed = tmp_path / "killed", 0
    for attempt in range(9):
        words = settings(model, out, 6, **more) if attempt == 0 else ["train", "--resume", out][1:]
        with monkeypatch.context() as patch:
            if attempt < 3:
                patch.setattr(files.Path, "rename", dies)
            pid = in_a_fork("train", *words, "--quiet")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        n_killed += code == -signal.SIGKILL
        if code == 0:
            break
    assert code == 0 and n_killed >= 1
    assert rows(tmp_path / "whole") == rows(out)
    pair = [json.loads((folder / "best" / "best.json").read_text()) for folder in (tmp_path / "whole", out)]
    assert pair[0] == pair[1] and math.isfinite(pair[0]["value"]) and pair[0]["num_timesteps"] > 0
    models = [(folder / "best" / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", out)]
    assert models[0] == models[1]
