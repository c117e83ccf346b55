"""The example of film reviews, run from top to bottom on made-up sentences, and resumed."""

import json

import pytest

from agents import bpe_tokenizer
from tests.docs.test_examples import run
from tests.helpers.command import small_model
from tests.helpers.models import seldom
from tests.helpers.task_data import write_data
from tests.helpers.weights.real_model import real_model
from textenv.tasks.reviews import FILES


@pytest.fixture
def folder(tmp_path):
    """Write sentences in which one word tells the mood; return their folder."""
    return write_data(tmp_path / "data")["Reviews"]


@pytest.fixture
def model(folder, tmp_path):
    """Save a tiny GPT-2 with fresh weights and a tokenizer of the sentences; return its folder."""
    texts = [line for name in FILES for line in (folder / name).read_text().splitlines()]
    return small_model(tmp_path / "start", bpe_tokenizer(texts, vocab_size=300), n_positions=128)


@pytest.mark.parametrize("algorithm", seldom(["ppo", "grpo"]))
def test_the_example_runs_and_resumes_where_it_was_stopped(folder, model, algorithm, tmp_path):
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("peft")
    out = tmp_path / "out"
    words = ("--data", folder, "--model", model, "--algorithm", algorithm, "--smoke", "--out", out)
    command = ("examples/reviews.py", *words)
    printed = run(*command)
    assert "| judge | " in printed and "found" not in printed
    result = json.loads((out / "results.json").read_text())
    shown = {"length", "reward", "judge", "perplexity", "distinct_2", "blank", "broken"}
    assert result["figures"].keys() == result["before"].keys() == shown and len(result["texts"]) == 8
    assert json.loads((out / "judge.json").read_text())["held_out"]["n_texts"] == 12
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "policy" / "model.safetensors").is_file() and (out / "results.md").is_file()

    # Stopped after the judge: it is not trained again, and the rest gives the same results.
    (out / "results.json").unlink()
    again = run(*command)
    assert "judge: found in" in again and "PPO: continues from" in again
    assert json.loads((out / "results.json").read_text())["figures"] == result["figures"]

    with pytest.raises(AssertionError, match="holds a run with other settings"):
        run(*command, "--seed", 1)


@pytest.mark.slow
def test_the_example_runs_on_a_pretrained_model(folder, tmp_path):
    """SmolLM2 from start to end in a small size; it shows that everything fits, and no gain."""
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("peft")
    out = tmp_path / "out"
    run("examples/reviews.py", "--data", folder, "--model", real_model(), "--smoke", "--out", out, timeout=900)
    result = json.loads((out / "results.json").read_text())
    figures = {name: figure["value"] for name, figure in result["figures"].items()}
    assert 5 < figures["perplexity"] < 500 and figures["blank"] < 0.5 and figures["broken"] < 0.5
    assert result["before"]["perplexity"]["value"] < 200, "the texts are the pretrained model's own"
    assert any(text["text"].isascii() and " the " in text["text"] for text in result["texts"])
