"""`textenv train` and its arguments: the files that a run leaves, refusals, help, and the function of each verb."""

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM

from agents.cli import main as cli
from agents.configuration.config import TrainConfig
from tests.helpers.command import ROLLOUT, environment, rows, run, settings


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "done"
    assert run("train", *settings(model, out, loggers="[curves, tensorboard]", license="mit"), "--quiet") == 0
    return out


def test_a_run_leaves_all_that_it_should(done, model):
    names = {path.name for path in done.iterdir()}
    wanted = (
        "config.yml run.json metrics.jsonl samples.jsonl curves.png tensorboard checkpoints best model history.json"
    )
    assert names >= {*wanted.split(), "results.json", "results.md"}
    lines = rows(done)
    assert [row["tokens"] for row in lines] == [0, *(ROLLOUT * i for i in (1, 2, 3, 4))]
    assert all({"reward/task", "kl/sequence", "train/loss", "train/skipped_updates"} <= row.keys() for row in lines[1:])
    assert [row["tokens"] for row in lines if "eval/reward" in row] == [0, 2 * ROLLOUT, 4 * ROLLOUT]
    samples = rows(done, "samples.jsonl")
    assert [row["tokens"] for row in samples] == [0] * 4 + [2 * ROLLOUT] * 4 + [4 * ROLLOUT] * 4
    assert {"prompt", "text", "end_reason", "reward", "parts"} <= samples[0].keys()
    about = json.loads((done / "run.json").read_text())
    assert about["format"] == 1 and {"torch", "textenv", "transformers"} <= about["versions"].keys()
    kept = yaml.safe_load((done / "config.yml").read_text())
    assert kept["model"]["name"] == str(model) and kept["kl"]["coef"] == 0.05
    assert not [path for path in done.rglob(".*.partial-*")]
    assert sorted(path.name for path in (done / "checkpoints").iterdir())[-1] == f"step_{4 * ROLLOUT:012d}"
    assert len(list((done / "checkpoints").iterdir())) == 3


def test_the_model_has_a_card_and_loads(done):
    card = (done / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "| reward |" in card and '"learning_rate": 0.01' in card
    assert AutoModelForCausalLM.from_pretrained(done / "model").config.n_layer == 1
    assert (done / "best" / "model" / "tokenizer.json").is_file()


def test_the_config_that_is_kept_is_the_run(done):
    config, _, dumped = cli.train_config([str(done / "config.yml")])
    assert dumped == (done / "config.yml").read_text() and isinstance(config, TrainConfig)


def test_json_lines_are_those_of_the_file(model, tmp_path, capsys):
    assert run("train", *settings(model, tmp_path / "run", rollouts=1), "--json") == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "Expected a verb among .*, got 'trian': did you mean 'train'"),
        (["train", "--model.topk", "3"], "model.topk 3: did you mean 'model.top_k'"),
        (["train", "--algorithm.learning_rat", "3"], "learning_rat 3: did you mean 'algorithm.learning_rate'"),
        (["train", "--seed", "x"], "Expected seed to be a whole number, got 'x'"),
        (["train", "nowhere.yml"], "Expected a configuration file, got nowhere.yml: No such file"),
        (["train", "--resume", "nowhere"], "Expected the folder of a run, got nowhere, which has no run.json"),
        (["train", "--loggers", "[tensorbored]"], "Expected a logger among tensorboard, .*, got 'tensorbored'"),
        (["train", "--out", "/proc/run"], "Expected a folder to write to, got /proc/run"),
    ],
)
def test_refusals(words, message, capfd):
    assert run(*words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env: {idd: demo}", "'idd': did you mean 'env.id'"),
        ("allow: [os]", "Expected allow only on the command line"),
        ("trust_remote_code: true", "Expected trust_remote_code only on the command line"),
        ("seed: !!python/object/apply:os.getcwd []", "Expected plain YAML"),
        ("env: {reward: 'os:getcwd'}", "add --allow os"),
        ("env: {reward: {id: sum, args: {parts: {a: {id: 'shutil:rmtree'}}}}}", "add --allow shutil"),
        ("env: {args: {reward: {name: 'shutil:no name'}}}", "Expected the name of a reward, or module:Class"),
        ("loggers: ['subprocess:Popen']", "add --allow subprocess"),
        ("env: {id: 'os:Env'}", "add --allow os"),
    ],
)
def test_configurations_that_are_refused(text, message, tmp_path, model, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yml").write_text(text)
    words = [] if "id: 'os" in text else [f"--model.name={model}"]
    for file in ("config.yml", "--config=config.yml"):
        assert run("train", file, *words, "--out", tmp_path / "run") == 2
        assert re.search(message, capfd.readouterr().err) or "YAML" in message
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_run_that_was_refused_before_it_trained_can_be_begun_again(model, tmp_path, capfd):
    out, own = tmp_path / "run", tmp_path / "own"
    own.mkdir()
    (own / "config.yml").write_text("seed: 3\n")
    for folder in (out, own):
        assert (
            run("train", *settings(model, folder, rollouts=1, **{"env.reward": "{id: length, args: {targe: 1}}"})) == 2
        )
        assert "for the reward 'length', got 'targe': did you mean 'target'?" in capfd.readouterr().err
    assert [path.name for path in sorted(out.iterdir())] == ["lock", "log.txt"]
    assert (own / "config.yml").is_file()
    assert run("train", *settings(model, out, rollouts=1), "--quiet") == 0
    assert run("train", *settings(tmp_path / "no", tmp_path / "none"), "--quiet") == 2
    assert not (tmp_path / "none").exists()


def test_help_loads_no_torch():
    code = (
        "import sys; from agents.cli.main import VERBS, main\nfor verb in VERBS:\n"
        "    try: main([verb, '--help'])\n    except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'gymnasium'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True).stdout
    assert "--algorithm.n_envs" in out
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_has_its_function(verb):
    module, _, function = cli.VERBS[verb].function.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.slow
def test_the_package_loads_its_names_when_they_are_asked_for():
    code = (
        "import sys, agents\nassert 'torch' not in sys.modules\nfrom agents import export, doctor\n"
        "assert callable(export) and callable(doctor.check) and 'torch' in sys.modules\n"
        "assert {'make_agent', 'TrainConfig'} <= set(dir(agents)) & set(agents.__all__)\n"
        "try: agents.nothing\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout == "module 'agents' has no attribute 'nothing'\n", done.stderr
