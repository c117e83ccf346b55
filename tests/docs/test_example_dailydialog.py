"""The DailyDialog example, run from top to bottom on made-up dialogues in the data set's file format."""

import json

import pytest

from tests.docs.test_examples import run
from tests.helpers.dialogues import made_up, write_dialogues

FIGURES = {"length", "reward", "reward/intent", "reward/meteor", "kl", "kl_token", "rouge1", "rouge2", "rougeL"}
FIGURES |= {"rougeLsum", "sacrebleu", "chrf", "intent_accuracy", "perplexity", "length_words"}


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
