"""Seeded damage of all kinds: no traceback; the newest intact state is taken, or one line names the file."""

import json
import random
import shutil

import pytest

from agents import Pretrained
from agents.checkpoints.checkpoint import load_checkpoint, save_step
from agents.checkpoints.manifest import CheckpointError, newest_intact, write_manifest
from agents.errors import CommandError
from agents.evaluation.evaluate_callback import BEST, HISTORY
from agents.runs.assemble import load_tokenizer
from agents.runs.folder import SAMPLE, RunFolder, read_rows
from tests.helpers.command import run, settings, small_model
from tests.helpers.training import tiny_agent
from textenv.checks.json_files import read_json

OTHER = [None, True, 0, -1, 1e300, 10**30, "", "x", [], {}, [[]], {"a": 1}, "\u2028", [None]]
REFUSED = (2, 5)


def damaged(content, name, choose):
    """The bytes of a file with something wrong: bits flipped, cut short, or a value of its JSON of another kind."""
    kinds = ["flip", "flip", "cut", "insert"] + (["json"] * 4 if name.endswith((".json", ".jsonl")) else [])
    kind, made = choose.choice(kinds), bytearray(content)
    if kind == "flip":
        for _ in range(choose.choice([1, 1, 2, 9])):
            made[choose.randrange(len(made))] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del made[choose.randrange(len(made)) :]
    elif kind == "insert":
        place = choose.randrange(len(made))
        made[place:place] = choose.randbytes(choose.choice([1, 5, 4000]))
    elif name.endswith(".jsonl"):
        lines = content.decode().split("\n")[:-1]
        place = choose.randrange(len(lines))
        lines[place] = json.dumps(changed(json.loads(lines[place]), choose))
        return "".join(f"{line}\n" for line in lines).encode()
    else:
        return json.dumps(changed(json.loads(content), choose)).encode()
    return bytes(made)


def changed(value, choose):
    """A JSON value in which one is another, has gone, or stands under another key."""
    if not isinstance(value, (dict, list)) or not value or choose.random() < 0.1:
        return choose.choice(OTHER)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = choose.choice(keys)
    made = dict(value) if isinstance(value, dict) else list(value)
    if choose.random() < 0.6:
        made[key] = changed(value[key], choose)
    else:
        gone = made.pop(key)
        if isinstance(made, dict) and choose.random() < 0.5:
            made[f"{key}x"] = gone
    return made


def outside(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def beside(tmp_path):
    """A folder that nothing may touch."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "thesis.txt").write_text("years of work")
    before = outside(tmp_path / "beside")
    yield
    assert outside(tmp_path / "beside") == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*logits")
def test_six_hundred_damaged_checkpoints(tmp_path, beside):
    """Half of them are sealed again, as somebody would who makes them by hand."""
    model, victim, choose, outcomes = tiny_agent(), tiny_agent(), random.Random(0), []
    for _ in range(2):
        model.learn(16, reset_num_timesteps=False)
        save_step(model, tmp_path / "run", keep=2)
    before, newest = sorted((tmp_path / "run").iterdir())
    kept = {path.name: path.read_bytes() for path in newest.iterdir()}
    for number in range(600):
        for path in newest.iterdir():
            path.unlink()
        for name, content in kept.items():
            (newest / name).write_bytes(content)
        names = [name for name in sorted(kept) if kept[name]]
        name = choose.choice([*names, "manifest.json", "state.json", "state.json"])
        (newest / name).write_bytes(damaged(kept[name], name, choose))
        if number % 2 and name != "manifest.json":
            (newest / "manifest.json").unlink()
            write_manifest(newest, model.num_timesteps)
        found, damage = newest_intact(tmp_path / "run")
        if found == before:
            assert str(newest) in damage[0]
            outcomes.append("before")
            continue
        assert found == newest
        try:
            load_checkpoint(victim, found)
        except CheckpointError as error:
            assert str(newest) in str(error), error
            outcomes.append("refused")
            victim = tiny_agent()  # what is made by hand may leave it half-changed
        else:
            outcomes.append("loaded")
    assert outcomes.count("before") > 200 and outcomes.count("refused") > 50
    load_checkpoint(tiny_agent(), before)


@pytest.mark.slow
def test_two_hundred_damaged_run_folders_are_read(tmp_path, beside):
    """What `compare` and `show` read of a run, without drawing or loading."""
    whole = tmp_path / "whole"
    assert run("train", *settings(small_model(tmp_path / "model"), whole, 2), "--quiet") == 0
    readers = {
        "run.json": lambda: RunFolder.open(whole).changed_versions(),
        "metrics.jsonl": lambda: read_rows(whole / "metrics.jsonl"),
        "samples.jsonl": lambda: read_rows(whole / "samples.jsonl", SAMPLE),
        "vocabulary.json": lambda: RunFolder(whole).check_vocabulary({}),
        "history.json": lambda: read_json(whole / "history.json", HISTORY),
        "best/best.json": lambda: read_json(whole / "best" / "best.json", BEST),
    }
    choose, refused = random.Random(3), 0
    for number in range(200):
        name = choose.choice(list(readers))
        content = (whole / name).read_bytes()
        (whole / name).write_bytes(damaged(content, name, choose))
        try:
            readers[name]()
        except (CommandError, ValueError) as error:
            assert str(whole) in str(error) and "\n" not in str(error), (number, name, error)
            refused += 1
        (whole / name).write_bytes(content)
    assert refused > 80


@pytest.mark.slow
def test_forty_damaged_run_folders_by_the_command(tmp_path, beside, capfd):
    model = small_model(tmp_path / "model")
    assert run("train", *settings(model, tmp_path / "whole", 2), "--quiet") == 0
    choose, refused = random.Random(1), 0
    names = ["run.json", "config.yml", "metrics.jsonl", "samples.jsonl", "vocabulary.json", "results.json"]
    for number in range(40):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        name = choose.choice(names)
        (copy / name).write_bytes(damaged((copy / name).read_bytes(), name, choose))
        words = choose.choice([["train", "--resume", copy, "--quiet"], ["export", copy, tmp_path / "to"]])
        capfd.readouterr()
        code = run(*words)
        said = capfd.readouterr().err
        assert code == 0 or code in REFUSED, (number, name, said)
        assert "Traceback" not in said, (number, name, said)
        if code:
            refused += 1
            [line] = [line for line in said.splitlines() if line.startswith("textenv: ")]
            # A configuration that is damaged may still be one, which names another model: then that is refused.
            assert str(copy) in line or name == "config.yml", (number, name, line)
        shutil.rmtree(copy)
        shutil.rmtree(tmp_path / "to", ignore_errors=True)
    assert refused > 10


@pytest.mark.slow
def test_two_hundred_damaged_models(tmp_path, beside):
    whole = small_model(tmp_path / "whole")
    choose, refused = random.Random(2), 0
    for number in range(200):
        copy = shutil.copytree(whole, tmp_path / "copy")
        name = choose.choice(sorted(path.name for path in copy.iterdir()))
        (copy / name).write_bytes(damaged((copy / name).read_bytes(), name, choose))
        try:
            load_tokenizer(str(copy))
            Pretrained(str(copy)).build()
        except (CommandError, ValueError, OSError) as error:
            assert str(copy) in str(error), (number, name, error)
            refused += 1
        shutil.rmtree(copy)
    assert refused > 60
