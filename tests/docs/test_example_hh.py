"""The example of preference pairs, run with `--smoke` on made-up pairs: of a new model, resumed, and a given one."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from agents import bpe_tokenizer
from tests.docs.test_examples import run
from tests.helpers.command import small_model


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


@pytest.mark.long
def test_the_example_trains_a_pretrained_model_for_one_reward_model_and_has_another_judge(tmp_path):
    pytest.importorskip("peft")
    out, data = tmp_path / "out", tmp_path / "pairs"
    write_pairs(data)
    texts = [json.loads(line)["chosen"] for line in (data / "pairs.jsonl").read_text().splitlines()]
    model = small_model(tmp_path / "start", bpe_tokenizer(texts, vocab_size=300), n_positions=128)
    printed = run("examples/hh.py", "--smoke", "--data", data, "--model", model, "--out", out)
    rows = {name: json.loads((out / f"{name}.json").read_text())["reward model"] for name in ("pairs", "judge")}
    assert {row["n_pairs"] for row in rows.values()} == {6}, "a tenth of the pairs"
    folders = [AutoModelForSequenceClassification.from_pretrained(out / name) for name in ("reward", "judge")]
    assert not torch.equal(*(folder.score.weight for folder in folders)), "they learned from other pairs"
    result = json.loads((out / "results.json").read_text())
    shown = {"length", "reward", "judge", "kl", "kl_token", "blank", "broken", "distinct_2", "perplexity"}
    assert result["figures"].keys() == shown == result["before"].keys() | {"kl", "kl_token"}
    samples, first = (out / "samples.txt").read_text(), result["texts"][0]["prompt"].split()[1]
    assert first in samples and first not in printed, "texts are kept, and none is printed"
    assert (out / "policy" / "model.safetensors").is_file() and not (out / "tuned").exists()
