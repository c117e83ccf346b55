"""The stages before PPO in several processes: the weights of one process, also after a stop or a kill."""

import json
import re

import pytest
from safetensors.numpy import load_file

from tests.agents.distributed.test_distributed import SAME, largest_difference
from tests.helpers.command import small_model
from tests.helpers.models import seldom
from tests.helpers.processes import launch
from textenv import demo

STAGES = {  # the words after each verb, without the folder and the model
    "sft": ["--data", "texts.txt", "--held_out", "texts.txt", "--batch_size", 4, "--n_epochs", 2],
    "classifier": ["--data", "labelled.jsonl", "--batch_size", 4, "--n_epochs", 2],
    "reward-model": ["--data", "pairs.jsonl", "--batch_size", 4, "--n_epochs", 2],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a model and the data of the stages."""
    home = tmp_path_factory.mktemp("stages")
    small_model(home / "small")
    (home / "texts.txt").write_text("\n".join(demo.reviews(16)))
    things = ("lamp", "phone", "blue lamp", "old black phone")
    pairs = [{"prompt": f"the {thing} was ", "chosen": "great .", "rejected": "awful ."} for thing in things] * 4
    (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    labelled = [{"text": f"the {thing} was {word} .", "label": word} for thing in things for word in ("great", "awful")]
    (home / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled * 2)))
    return home


@pytest.mark.parametrize(
    "verb", [pytest.param("sft", marks=pytest.mark.slow), "reward-model", *seldom(["classifier"], 1)]
)
def test_a_stage_trains_as_one_process_does(verb, data):
    """The same weights, with the rows of a minibatch shared; one folder, and one voice."""
    folders, printed = {}, {}
    for size in (1, 2):
        folders[size] = data / f"{verb}_{size}"
        results = launch(size, "run_command", stage(verb, data, folders[size]))
        assert [code for code, *_ in results] == [0] * size, results
        assert all(out == err == "" for _, out, err in results[1:])
        printed[size] = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.2f}", results[0][1])
    one, two = (load_file(folders[size] / "model.safetensors") for size in (1, 2))
    assert largest_difference(one, two) < 10 * SAME, "AdamW divides small gradients by their own size"
    start = load_file(data / "small" / "model.safetensors")
    assert max(abs(one[name] - start[name]).max() for name in one.keys() & start.keys()) > 1000 * SAME
    assert printed[1].replace(str(folders[1]), str(folders[2])) == printed[2]
    assert not (data / f".{folders[2].name}.training").exists()


@pytest.mark.parametrize("verb", seldom(["reward-model", "sft", "classifier"]))
def test_a_stage_goes_on_after_a_stop_or_a_kill(verb, data):
    """Stopped by Ctrl-C in one process, or with one killed, on any number of processes: no step is lost or repeated."""
    whole = data / f"{verb}_whole"
    results = launch(2, "run_command", stage(verb, data, whole))
    assert [code for code, *_ in results] == [0, 0], results
    weights = load_file(whole / "model.safetensors")
    for how, before, after in (("SIGINT", 2, 2), ("SIGINT", 1, 2), ("SIGKILL", 2, 2), ("SIGKILL", 2, 1)):
        folder = data / f"{verb}_{how}_{before}_{after}"
        words = stage(verb, data, folder)
        stopped = launch(before, "run_stage_until", words, 5, how)
        states = folder.with_name(f".{folder.name}.training")
        kept = sorted(path.name for path in states.iterdir() if path.is_dir())
        if how == "SIGINT":
            assert [code for code, *_ in stopped] == [130] * before, stopped
            said = "".join(err for *_, err in stopped)
            assert said.count("textenv:") == said.count("--resume continues") == 1, said
            assert kept == ["checkpoint-4", "checkpoint-5"]
        else:
            (code, _, said), lost = stopped
            assert code == 1 and isinstance(lost, ChildProcessError), stopped
            assert said.count("textenv:") == 1 and "no answer of rank 1" in said, said
            assert kept == ["checkpoint-2", "checkpoint-4"]
        assert not (folder / "model.safetensors").exists(), "nothing half-written"
        resumed = launch(after, "run_stage_until", [*words, "--resume"])
        assert [code for code, *_ in resumed] == [0] * after, resumed
        difference = largest_difference(load_file(folder / "model.safetensors"), weights)
        assert difference == 0 if before == after else difference < 10 * SAME, (how, before, after)
        n_steps = [re.search(r"(\d+) steps", results[0][1])[1] for results in (results, resumed)]
        assert n_steps[0] == n_steps[1] == "8" and not states.exists()


def stage(verb, data, folder):
    """Return the words of a stage."""
    words = [data / word if str(word) in DATA else word for word in STAGES[verb]]
    return [verb, "--model", data / "small", "--out", folder, "--quiet", "--learning_rate", 1e-3, *words]


DATA = ("texts.txt", "labelled.jsonl", "pairs.jsonl")
