"""Random damage of all kinds: no traceback; the newest intact state is used, or one line names the file."""

import json
import random
import shutil

import pytest

from agents import Pretrained
from agents.checkpoints.checkpoint import load_checkpoint, save_step
from agents.checkpoints.manifest import CheckpointError, newest_intact, write_manifest
from agents.errors import CommandError
from agents.evaluation.evaluation_files import BEST, HISTORY
from agents.evaluation.prompt_scores import read_scores
from agents.runs.assemble import load_tokenizer
from agents.runs.folder import SAMPLE, RunFolder, read_rows
from tests.helpers.command import run, settings, small_model
from tests.helpers.training import tiny_agent
from textenv.checks.json_files import read_json

# JSON values that replace others.
OTHER = [None, True, 0, -1, 1e300, 10**30, "", "x", [], {}, [[]], {"a": 1}, "\u2028", [None]]
REFUSED = (2, 5)  # exit codes: wrong input, storage


def damaged(content, name, rng):
    """Return a file's bytes with bits flipped, cut short, with bytes inserted, or with a changed JSON value."""
    kinds = ["flip", "flip", "cut", "insert"] + (["json"] * 4 if name.endswith((".json", ".jsonl")) else [])
    kind, result = rng.choice(kinds), bytearray(content)
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 9])):
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del result[rng.randrange(len(result)) :]
    elif kind == "insert":
        at = rng.randrange(len(result))
        result[at:at] = rng.randbytes(rng.choice([1, 5, 4000]))
    elif name.endswith(".jsonl"):
        lines = content.decode().split("\n")[:-1]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), rng))
        return "".join(f"{line}\n" for line in lines).encode()
    else:
        return json.dumps(changed(json.loads(content), rng)).encode()
    return bytes(result)


def changed(value, rng):
    """Return a JSON value in which one inner value is replaced, removed or moved to another key."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(OTHER)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    result = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.6:
        result[key] = changed(value[key], rng)
    else:
        removed = result.pop(key)
        if isinstance(result, dict) and rng.random() < 0.5:
            result[f"{key}x"] = removed
    return result


def outside(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def beside(tmp_path):
    """A folder beside the damaged ones, which nothing may touch."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "thesis.txt").write_text("years of work")
    before = outside(tmp_path / "beside")
    yield
    assert outside(tmp_path / "beside") == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*logits")
def test_six_hundred_damaged_checkpoints(tmp_path, beside):
    """Half of them get a valid manifest again, as from somebody who edits them by hand."""
    model, victim, rng, outcomes = tiny_agent(), tiny_agent(), random.Random(0), []
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
        name = rng.choice([*names, "manifest.json", "state.json", "state.json"])
        (newest / name).write_bytes(damaged(kept[name], name, rng))
        if number % 2 and name != "manifest.json":
            (newest / "manifest.json").unlink()
            write_manifest(newest, model.num_timesteps)
        intact, damage = newest_intact(tmp_path / "run")
        if intact == before:
            assert str(newest) in damage[0]
            outcomes.append("before")
            continue
        assert intact == newest
        try:
            load_checkpoint(victim, intact)
        except CheckpointError as error:
            assert str(newest) in str(error), error
            outcomes.append("refused")
            victim = tiny_agent()  # a hand-made checkpoint may have changed part of it
        else:
            outcomes.append("loaded")
    assert outcomes.count("before") > 200 and outcomes.count("refused") > 50
    load_checkpoint(tiny_agent(), before)


@pytest.mark.slow
def test_two_hundred_damaged_run_folders_are_read(tmp_path, beside):
    """The files that `compare` and `show` read, without drawing or loading a model."""
    whole = tmp_path / "whole"
    assert run("train", *settings(small_model(tmp_path / "model"), whole, 2), "--quiet") == 0
    readers = {
        "run.json": lambda: RunFolder.open(whole).changed_versions(),
        "metrics.jsonl": lambda: read_rows(whole / "metrics.jsonl"),
        "samples.jsonl": lambda: read_rows(whole / "samples.jsonl", SAMPLE),
        "vocabulary.json": lambda: RunFolder(whole).check_vocabulary({}),
        "history.json": lambda: read_json(whole / "history.json", HISTORY),
        "scores.json": lambda: read_scores(whole / "scores.json"),
        "best/best.json": lambda: read_json(whole / "best" / "best.json", BEST),
    }
    rng, refused = random.Random(3), 0
    for number in range(200):
        name = rng.choice(list(readers))
        content = (whole / name).read_bytes()
        (whole / name).write_bytes(damaged(content, name, rng))
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
    rng, refused = random.Random(1), 0
    names = ["run.json", "config.yml", "metrics.jsonl", "samples.jsonl", "vocabulary.json", "results.json"]
    for number in range(40):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        name = rng.choice(names)
        (copy / name).write_bytes(damaged((copy / name).read_bytes(), name, rng))
        words = rng.choice([["train", "--resume", copy, "--quiet"], ["export", copy, tmp_path / "to"]])
        capfd.readouterr()
        code = run(*words)
        err = capfd.readouterr().err
        assert code == 0 or code in REFUSED, (number, name, err)
        assert "Traceback" not in err, (number, name, err)
        if code:
            refused += 1
            [line] = [line for line in err.splitlines() if line.startswith("textenv: ")]
            # A damaged configuration may still be valid but name another model; then that model is refused.
            assert str(copy) in line or name == "config.yml", (number, name, line)
        shutil.rmtree(copy)
        shutil.rmtree(tmp_path / "to", ignore_errors=True)
    assert refused > 10


@pytest.mark.slow
def test_two_hundred_damaged_models(tmp_path, beside):
    whole = small_model(tmp_path / "whole")
    rng, refused = random.Random(2), 0
    for number in range(200):
        copy = shutil.copytree(whole, tmp_path / "copy")
        name = rng.choice(sorted(path.name for path in copy.iterdir()))
        (copy / name).write_bytes(damaged((copy / name).read_bytes(), name, rng))
        try:
            load_tokenizer(str(copy))
            Pretrained(str(copy)).build()
        except (CommandError, ValueError, OSError) as error:
            assert str(copy) in str(error), (number, name, error)
            refused += 1
        shutil.rmtree(copy)
    assert refused > 60
