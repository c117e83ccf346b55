"""The example of steering, run from top to bottom with one prompt and with files of prompts."""

import json

import pytest

from agents import bpe_tokenizer
from tests.docs.test_examples import run
from tests.helpers.command import ROOT, small_model
from tests.helpers.models import seldom

FILES = [ROOT / "examples" / "configs" / "smollm2" / f"steering_{part}.txt" for part in ("prompts", "held_out")]


@pytest.mark.parametrize("files", seldom([FILES, ()]))
def test_the_example_runs_and_resumes(files, tmp_path):
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("peft")
    texts = [line for file in FILES for line in file.read_text().splitlines()]
    model = small_model(tmp_path / "start", bpe_tokenizer(texts, vocab_size=300), n_positions=128)
    words = [word for pair in zip(("--prompts", "--held_out"), files) for word in pair]
    command = ("examples/steering.py", "--model", model, *words, "--smoke", "--out", tmp_path / "out")
    assert "| reward | " in run(*command)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(result["texts"]) == (64 if files else 8) and result["n_prompts"] == 8
    assert (tmp_path / "out" / "policy" / "model.safetensors").is_file()
    (tmp_path / "out" / "results.json").unlink()
    assert "PPO: continues from" in run(*command)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["figures"] == result["figures"]


def test_the_prompts_of_the_evaluation_are_not_those_of_training():
    trained, held_out = (set(file.read_text().splitlines()) for file in FILES)
    assert len(trained) == len(held_out) == 24 and not trained & held_out
