"""The command with weights spread over processes: the run of one process, its files, and how it goes on."""

import json

import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tests.agents.distributed.test_distributed import SAME, largest_difference
from tests.helpers.command import ROLLOUT, rows, settings, small_model
from tests.helpers.models import seldom
from tests.helpers.processes import launch

RATE = {"algorithm.learning_rate": 5e-4, "algorithm.schedule": "constant"}
WAYS = ["gathered", "lock_step", "offloaded"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    small_model(folder / "small")
    return folder


def command(size, *words, environments=None):
    """Run the command in some processes, with texts that do not depend on their number; return what rank 0 prints."""
    results = launch(size, "run_command", list(words), True, environments=environments, timeout=60)
    assert [code for code, *_ in results] == [0] * size, results
    return results[0][1]


@pytest.fixture(scope="module")
def alone(home):
    """The run of one process, which does not look at `model.shard`."""
    command(1, "train", *settings(home / "small", home / "alone", 2, **RATE, **{"model.shard": "gathered"}))
    return home / "alone"


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("way", seldom(WAYS, 1))
def test_a_run_with_shards_is_that_of_one_process(way, home, alone):
    """Stopped after a rollout and resumed: the same weights and rows, and shards in its checkpoints."""
    run = home / way
    options = {**RATE, "model.shard": way}
    command(2, "train", *settings(home / "small", run, 1, **options))
    assert (run / "checkpoints" / f"step_{ROLLOUT:012}" / "shards").is_dir()
    command(2, "train", "--resume", run, f"--total_tokens={2 * ROLLOUT}", "--change", "total_tokens")
    assert largest_difference(weights(run), weights(alone)) < SAME
    start = load_file(home / "small" / "model.safetensors")
    assert largest_difference(start, weights(run)) > 100 * SAME, "a control: it learns something"
    assert [row["tokens"] for row in rows(run)] == [0, ROLLOUT, 2 * ROLLOUT]
    for row, expected in zip(rows(run), rows(alone), strict=True):
        figures = {name: value for name, value in expected.items() if not isinstance(value, str)}
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_the_folders_are_ordinary_ones(home, alone):
    """Other numbers of processes and whole weights go on from shards; `generate` and `evaluate` read the run."""
    run = home / "read"
    command(2, "train", *settings(home / "small", run, 1, **RATE, **{"model.shard": "gathered"}))
    assert sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(run / "model").parameters()) > 0
    (home / "prompts.txt").write_text("this phone is\nthe lamp was\n")
    words = ["generate", run, "--prompts", home / "prompts.txt", "--max_new_tokens", 4]
    texts = [command(size, *words) for size in (1, 2)]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 2
    of_folder = command(1, "generate", run / "model", *words[2:])
    assert [json.loads(line)["text"] for line in of_folder.splitlines()] == [
        json.loads(line)["text"] for line in texts[0].splitlines()
    ]
    tables = [command(size, "evaluate", run, "--n_prompts", 4) for size in (1, 2)]
    assert tables[0] == tables[1] and "| reward |" in tables[0]
    for size, *change in [(4,), (1,), (2, "--model.shard=null", "--change", "model.shard")]:
        tokens = rows(run)[-1]["tokens"] + ROLLOUT
        change = [*change, f"--total_tokens={tokens}", "--change", "total_tokens"]
        command(size, "train", "--resume", run, *change)
        assert rows(run)[-1]["tokens"] == tokens
        assert (run / "checkpoints" / f"step_{tokens:012}" / "shards").is_dir() == (size == 4)


@pytest.mark.slow
def test_accelerate_asks_for_shards_of_training_alone(home, alone):
    """`accelerate launch --use_fsdp --fsdp_version 2` sets these variables."""
    asked = {rank: {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} for rank in (0, 1)}
    run = home / "accelerated"
    command(2, "train", *settings(home / "small", run, 2, **RATE), environments=asked)
    assert largest_difference(weights(run), weights(alone)) < SAME
    assert (run / "checkpoints" / f"step_{2 * ROLLOUT:012}" / "shards").is_dir()
    results = launch(2, "run_command", ["generate", run], environments=asked)
    said = "textenv: Expected --use_fsdp for textenv train only, got it for generate: leave it out.\n"
    assert [code for code, *_ in results] == [2, 2] and results[0][2] + results[1][2] == said
