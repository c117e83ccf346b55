"""The DailyDialog example, run from top to bottom on made-up dialogues in the data set's file format."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from agents import bpe_tokenizer
from tests.docs.test_examples import run
from tests.helpers.command import small_model
from tests.helpers.dialogues import made_up, write_dialogues
from tests.helpers.weights.real_model import real_model

FIGURES = {"length", "reward", "reward/intent", "reward/meteor", "kl", "kl_token", "rouge1", "rouge2", "rougeL"}
FIGURES |= {"rougeLsum", "sacrebleu", "chrf", "intent_accuracy", "perplexity", "length_words", "blank", "broken"}


@pytest.mark.long
def test_the_example_writes_its_table_and_skips_finished_stages(tmp_path):
    data, out = write_dialogues(tmp_path / "data", made_up(60)), tmp_path / "out"
    command = ("examples/dailydialog.py", "--data", data, "--smoke", "--seed", 1, "--out", out)
    printed = run(*command, "--turns", 2)
    assert "found in" not in printed and printed.count("met: ") == 4
    results = json.loads((out / "results.json").read_text())
    for kind in ("figures", "before"):
        assert results[kind].keys() >= FIGURES
        assert any(name.startswith("meteor") for name in results[kind])
    assert results["n_prompts"] == 8
    assert "| intent_accuracy |" in (out / "results.md").read_text()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model" / "model.safetensors").is_file()
    again = run(*command, "--turns", 2)
    assert again.count(f"found in {out}") == 3 and "continues from" in again
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.slow
def test_of_a_pretrained_model_ppo_trains_adapters_alone(tmp_path):
    pytest.importorskip("peft")
    dialogues, out = made_up(60), tmp_path / "out"
    data = write_dialogues(tmp_path / "data", dialogues)
    tokenizer = bpe_tokenizer([turn for dialogue in dialogues for turn in dialogue.turns], vocab_size=300)
    model = small_model(tmp_path / "start", tokenizer, n_positions=256)
    printed = run("examples/dailydialog.py", "--data", data, "--model", model, "--smoke", "--out", out, timeout=600)
    assert printed.count("met: ") == 4
    results = json.loads((out / "results.json").read_text())
    assert results["figures"].keys() == results["before"].keys() >= FIGURES - {"kl", "kl_token"}
    # The samples that are printed are every second text, which only then are of different prompts.
    prompts = [text["prompt"] for text in results["texts"]]
    assert prompts[::2] == prompts[1::2] and len(prompts) == 16 == 2 * results["n_prompts"]
    before, after = (load_file(out / name / "model.safetensors") for name in ("supervised", "model"))
    changed = {name for name, weight in before.items() if not np.array_equal(weight, after[name])}
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.0.{layer}.weight" for layer in linear}
    with pytest.raises(AssertionError, match="holds a run with other settings"):
        run("examples/dailydialog.py", "--data", data, "--smoke", "--out", out)


@pytest.mark.long  # CI runs the film reviews on that model
def test_the_example_runs_on_a_pretrained_model(tmp_path):
    """SmolLM2 from start to end in a small size; it shows that everything fits, and no gain."""
    pytest.importorskip("peft")
    data, out = write_dialogues(tmp_path / "data", made_up(60)), tmp_path / "out"
    run("examples/dailydialog.py", "--data", data, "--model", real_model(), "--smoke", "--out", out, timeout=900)
    result = json.loads((out / "results.json").read_text())
    figures = {name: figure["value"] for name, figure in result["figures"].items()}
    assert figures["perplexity"] < 500 and figures["blank"] < 0.5 and figures["broken"] < 0.5
    assert any(text["text"].isascii() and " the " in text["text"] for text in result["texts"])
