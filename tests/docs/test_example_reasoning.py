"""The example of checked answers, run from top to bottom with each algorithm and with shuffled rewards, and resumed."""

import json

import pytest

from agents import bpe_tokenizer
from tests.docs.test_examples import run
from tests.helpers.command import small_model
from tests.helpers.models import seldom


@pytest.mark.parametrize("words", seldom([("--algorithm", "grpo"), (), ("--shuffled",)]))
def test_the_example_runs_and_resumes(words, tmp_path):
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("peft")
    texts = [f"State the final answer to the following arithmetic problem: {n} - 7 =\nAnswer: {n}" for n in range(99)]
    model = small_model(tmp_path / "start", bpe_tokenizer(texts, vocab_size=300), n_positions=128)
    command = ("examples/reasoning.py", "--model", model, *words, "--smoke", "--out", tmp_path / "out")
    printed = run(*command)
    assert "| reward | " in printed and "greedily, after: " in printed
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(result["texts"]) == 8 and (tmp_path / "out" / "policy" / "model.safetensors").is_file()
    (tmp_path / "out" / "results.json").unlink()
    printed = run(*command)
    assert "base: found in" in printed and "PPO: continues from" in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["figures"] == result["figures"]
