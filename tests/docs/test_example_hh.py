"""The example of preference pairs, run with `--smoke` on made-up pairs, and resumed."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.docs.test_examples import run


def write_pairs(folder, n=60):
    rng = random.Random(0)
    rows = []
    for number in range(n):
        prompt = f"\n\nHuman: question {number} about {rng.choice(['cats', 'dogs', 'tea'])}\n\nAssistant:"
        replies = (f" kind words {rng.choice('abc')}", f" rude words and more {rng.choice('abc')}")
        rows.append({"chosen": prompt + replies[0], "rejected": prompt + replies[1]})
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.long
def test_the_example_runs_and_skips_finished_stages(tmp_path):
    out = tmp_path / "out"
    write_pairs(tmp_path / "pairs")
    command = ("examples/hh.py", "--smoke", "--data", tmp_path / "pairs", "--out", out)
    printed = run(*command)
    assert "| perplexity |" in printed and "found in" not in printed
    rows = json.loads((out / "pairs.json").read_text())
    assert rows["reward model"]["n_pairs"] == 10 and rows["reward model"]["low"] < rows["reward model"]["high"]
    # Length or words alone tell the made-up replies apart.
    assert rows["length alone"]["accuracy"] == rows["bag of words"]["accuracy"] == 1.0
    results = (out / "results.json").read_text()
    assert {"reward", "length", "kl", "blank", "distinct_2", "perplexity"} <= json.loads(results)["figures"].keys()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert AutoModelForSequenceClassification.from_pretrained(out / "reward").config.num_labels == 1
    policy = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(out / "tuned").state_dict()
    assert any(not torch.equal(policy[name], tuned[name]) for name in tuned)

    for name in ("results.json", "results.md"):
        (out / name).unlink()
    shutil.rmtree(out / "policy")
    again = run(*command)
    assert "tuned: found in" in again and "pairs: found in" in again and "PPO: continues from" in again
    assert (out / "results.json").read_text() == results

    with pytest.raises(AssertionError, match="holds a run with other settings"):
        run(*command, "--seed", 1)
