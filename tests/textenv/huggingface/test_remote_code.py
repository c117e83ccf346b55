"""Model folders with their own code: it runs only if the command line allows it, and nobody is asked."""

import json
import shutil

import pytest

from tests.helpers.command import ROOT, run, settings
from tests.helpers.rewards import preds_of
from textenv import Prompt
from textenv.huggingface.weights import from_config
from textenv.rewards import make_reward


@pytest.fixture
def with_code(model, tmp_path):
    """Make a model folder with its own class, whose import creates the file `mark`."""
    folder = shutil.copytree(model, tmp_path / "with_code")
    (folder / "own_code.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_code.C", "AutoModelForCausalLM": "own_code.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own_code.C", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    "config", ["", "env: {reward: {id: likelihood, args: {model: MODEL}}}", "kl: {reference: MODEL}"]
)
def test_a_models_own_code_is_refused_and_nobody_is_asked(config, with_code, model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    (tmp_path / "c.yml").write_text(config.replace("MODEL", str(with_code)) or "{}")
    words = settings(model if config else with_code, tmp_path / "run", rollouts=1)
    assert run("train", tmp_path / "c.yml", *words, "--quiet") == 2
    assert "Expected a model without code of its own, got" in capfd.readouterr().err
    if not config:
        (tmp_path / "p.txt").write_text("a\n")
        assert run("generate", with_code, "--prompts", tmp_path / "p.txt") == 2
        assert "Expected a model without code of its own" in capfd.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_a_models_own_code_runs_where_the_command_line_says_so(with_code, tmp_path, capfd):
    words = settings(with_code, tmp_path / "run", rollouts=1)
    assert run("train", *words, "--trust_remote_code", "--quiet") != 0  # the own class is no tokenizer
    assert (tmp_path / "mark").exists()


def test_a_config_with_code_of_its_own_is_refused(model):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    config.auto_map, config.name_or_path = {"AutoModelForCausalLM": "own/repo--own_code.C"}, ""
    assert from_config(AutoModelForCausalLM, config).config.n_layer == 1  # transformers' own class was used


def test_all_loading_by_transformers_is_in_weights_py():
    """`from_pretrained` of transformers asks on the terminal unless `trust_remote_code` is given."""
    for package in ("textenv", "agents"):
        for file in (ROOT / package).rglob("*.py"):
            code = [line for line in file.read_text().splitlines() if ">>>" not in line and "`" not in line]
            calls = [line for line in code if ".from_pretrained(" in line or ".from_config(" in line]
            assert not calls or file.name == "weights.py", (file, calls)


def test_a_sentence_transformers_folder_cannot_name_its_own_code(model, tmp_path):
    """Its `modules.json` names classes to import, and one may be in a file of the folder."""
    pytest.importorskip("sentence_transformers", reason="needs the extra similarity")
    folder = shutil.copytree(model, tmp_path / "embedder")
    (folder / "own_code.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass C: pass\n")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "own_code.C"}]))
    reward = make_reward("similarity", model=str(folder), text="good")
    with pytest.raises(ValueError, match=r"Expected a model without code of its own, got '.*embedder'"):
        reward.score([Prompt("a")], [preds_of("b")], [True])
    assert not (tmp_path / "mark").exists()
