"""The command in several processes: what it trains, writes and prints is what one process does."""

import json
import math
import re
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from agents.report.page import inert_json
from tests.agents.distributed.test_distributed import SAME, largest_difference
from tests.helpers.command import ROLLOUT, environment, rows, settings, small_model
from tests.helpers.processes import free_port, launch
from tests.helpers.processes import train as run_all

N_ROLLOUTS = 2
CLOCKED = ("time/", "share")  # figures of the clock, in the rows and among the curves of a report


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model."""
    folder = tmp_path_factory.mktemp("several")
    small_model(folder / "small")
    return folder


@pytest.fixture(scope="module")
def trained(home):
    """Return a function that trains the same run in any number of processes, once; it returns its folder."""
    done = {}

    def train(size):
        if size not in done:
            folder = home / f"of_{size}"
            # AdamW divides small gradients by their own size, and so the rounding of sums in another order, too.
            rate = {"algorithm.learning_rate": 5e-4}
            words = ["train", *settings(home / "small", folder, N_ROLLOUTS, **rate)]
            results = run_all(size, "run_command", words, True, timeout=200)
            assert [code for code, *_ in results] == [0] * size, results
            done[size] = folder, results
        return done[size]

    return train


SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
def test_the_run_is_that_of_one_process(size, trained):
    """Weights, evaluations and samples are the same, and so are the rows of figures, once."""
    (one, _), (several, _) = trained(1), trained(size)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, several)]
    assert largest_difference(*weights) < SAME
    before = load_file(one.parent / "small" / "model.safetensors")
    assert largest_difference(before, weights[0]) > 1000 * SAME, "it learns something"
    first, second = rows(one), rows(several)
    assert [row["tokens"] for row in first] == [row["tokens"] for row in second] == [0, ROLLOUT, 2 * ROLLOUT]
    for mine, theirs in zip(first, second):
        assert len(mine) > 30 or mine["tokens"] == 0
        assert differences(mine, theirs) == []
    assert rows(one, "samples.jsonl") == rows(several, "samples.jsonl")
    for name in ("history.json", "scores.json", "results.json", "best/best.json", "best/evaluation.json"):
        assert (one / name).read_bytes() == (several / name).read_bytes(), name
    for name in ("results.md", "config.yml"):
        assert (one / name).read_text().replace(str(one), str(several)) == (several / name).read_text()


def differences(mine, theirs, rounding=1e-6, place=""):
    """Return the places at which two structures of JSON differ, numbers by more than rounding."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return [] if theirs == pytest.approx(mine, rel=1e-4, abs=rounding, nan_ok=True) else [place]
    if isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() == theirs.keys():
        return [found for key in mine for found in differences(mine[key], theirs[key], rounding, f"{place}/{key}")]
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return [found for i in range(len(mine)) for found in differences(mine[i], theirs[i], rounding, f"{place}/{i}")]
    return [] if mine == theirs and type(mine) is type(theirs) else [place]


def shown(folder):
    """Return what a run's page shows, without times and paths, and the page around it: script, style and text."""
    page = (folder / "report.html").read_text().replace(inert_json(str(folder))[1:-1], "RUN")
    before, _, rest = page.partition('<script type="application/json" id="data">')
    text, _, after = rest.partition("</script>")
    data = json.loads(text)
    (run,) = data["runs"]
    made = data.pop("made")
    assert run["name"] == data["title"] == folder.name and made.startswith("20")
    run["name"] = data["title"] = "of several"
    run["figures"] = {name: curve for name, curve in run["figures"].items() if not name.startswith(CLOCKED)}
    for language, took in (("en", "It took "), ("zh", "用时 ")):
        told = run["summary"][language]
        run["summary"][language] = [sentence for sentence in told if not sentence.startswith(took)]
        assert len(told) == len(run["summary"][language]) + 1
    return data, (before + after).replace(folder.name, "of several")


@pytest.mark.parametrize("size", SIZES)
def test_the_report_is_that_of_one_process(size, trained):
    """All that the page shows: sentences, findings, tables, curves, samples, and the numbers of single tokens."""
    (one, _), (several, _) = trained(1), trained(size)
    (mine, page), (theirs, other_page) = shown(one), shown(several)
    # A token's divergence is a difference of two log-probabilities of about 5 nats, rounded to 4 digits.
    assert differences(mine, theirs, 1e-5) == [] and page == other_page
    (run,) = theirs["runs"]
    assert len(run["figures"]) > 20 and len(run["samples"]["tables"]) > 1 and run["evaluations"]["reward"]["y"]
    assert [len(table["episodes"]) for table in run["episodes"]["tables"]] == [4, 4], "of all processes"
    # A control: one figure, one token and one word that differ are found.
    run["figures"]["episode/count"][-1] = 1.5
    run["episodes"]["tables"][1]["episodes"][3]["value"][0] += 0.01
    run["summary"]["en"][0] += "!"
    assert len(differences(mine, theirs, 1e-5)) == 3


def test_one_process_speaks(trained):
    """Rank 0 prints what one process prints, and the other nothing; there is one folder."""
    (one, ((_, alone, _),)), (two, ((_, out, err), (_, *other))) = trained(1), trained(2)
    plain = [re.sub(r"tokens/s +\d+|left \S+", "", text.replace(str(two), str(one))) for text in (alone, out)]
    assert plain[0] == plain[1] and other == ["", ""] and "Traceback" not in err
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert len((two / "report.html").read_text()) > 10_000
    about = json.loads((two / "run.json").read_text())
    assert about["versions"]["textenv"] and not list(two.glob(".*partial*"))


@pytest.mark.slow
def test_a_warning_of_another_process_is_shown_once_with_its_rank(home):
    """Not what rank 0 says itself, with another number, and not again in the next iteration."""
    small = home / "small"
    (home / "two.txt").write_text("this phone is\nthe lamp was\n")
    generate = ["generate", small, "--prompts", home / "two.txt", "--max_new_tokens", 3]
    trains = {size: ["train", *settings(small, home / f"warned_{size}", N_ROLLOUTS)] for size in (1, 2)}
    for words, stream in ((trains, 1), ({1: generate, 2: generate}, 2)):
        alone, (first, other) = (launch(size, "run_with_warnings", words[size]) for size in (1, 2))
        assert [code for code, *_ in (*alone, first, other)] == [0, 0, 0], (alone, first, other)
        assert other[1:] == ("", "")
        said = [line for line in first[stream].splitlines() if "an odd text" in line or "rank 1" in line]
        assert said == ["warning: rank 1: an odd text"]
        assert all("a text of 5 words" in results[0][stream] for results in (alone, [first]))
        assert "6 words" not in first[1] + first[2] and "odd" not in alone[0][1] + alone[0][2]


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_it_goes_on_in_another_number_of_processes(size, home, trained):
    """The run of 2 processes is continued by others: each row once, and one warning of what is lost."""
    run = home / f"on_by_{size}"
    stopped = launch(2, "run_command", ["train", *settings(home / "small", run, 2)])
    more = ["train", "--resume", run, "--total_tokens", 4 * ROLLOUT, "--change", "total_tokens"]
    results = launch(size, "run_command", more)
    assert [code for code, *_ in (*stopped, *results)] == [0] * (2 + size), results
    assert [row["tokens"] for row in rows(run)] == [n * ROLLOUT for n in range(5)]
    said = [text for _, out, _ in results for text in re.findall("warning: The checkpoint was written by .*", out)]
    assert len(said) == 1 and f"by 2 processes and is loaded by {size}" in said[0]
    assert all(math.isfinite(row["train/loss"]) for row in rows(run)[1:])


@pytest.mark.slow
def test_texts_and_evaluations_do_not_depend_on_the_number_of_processes(home, trained, monkeypatch):
    """Four prompts a share: the same lines in the same order, the same table, the same file; printed once."""
    run, _ = trained(1)
    (home / "prompts.txt").write_text("\n".join(["this phone is", "the lamp was", "a good", "the", "my phone"] * 2))
    generate = ["generate", run, "--prompts", home / "prompts.txt", "--n", 2, "--max_new_tokens", 5]
    evaluate = ["evaluate", run, "--n_prompts", 10, "--metrics", "[distinct]"]
    found = {}
    for size in (1, 2):
        lines = launch(size, "run_shares_of_four", generate)
        table = launch(size, "run_shares_of_four", evaluate)
        assert [code for code, *_ in (*lines, *table)] == [0] * 2 * size, (lines, table)
        assert all(out == "" for _, out, _ in (*lines[1:], *table[1:]))
        found[size] = lines[0][1], table[0][1], (run / "evaluation.json").read_bytes()
    assert found[1] == found[2] and found[1][0].count("\n") == 20 and "| reward |" in found[1][1]
    whole = launch(1, "run_command", generate)[0][1]
    assert whole != found[1][0], "a control: other shares draw other texts"


@pytest.mark.slow
def test_seeds_are_trained_in_turn_each_as_alone(home):
    seeds, alone = home / "seeds", home / "alone"
    results = launch(2, "run_command", ["train", *settings(home / "small", seeds, 1), "--seeds", 0, 1], timeout=120)
    assert [code for code, *_ in results] == [0, 0] and results[0][1].count("seeds.md") == 1, results
    launch(2, "run_command", ["train", *settings(home / "small", alone, 1), "--seed", 1])
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (seeds / "seed_1", alone)]
    assert largest_difference(*weights) == 0
    assert (seeds / "seeds.md").is_file() and (seeds / "report.html").is_file()


@pytest.mark.slow
def test_the_launchers_start_real_processes(home):
    """`--processes`, torchrun and accelerate give the same run."""
    folders = []
    for name, words in LAUNCHERS.items():
        folders.append(home / name)
        training = ["train", *settings(home / "small", folders[-1], 1)]
        command = [sys.executable, "-m", *(word.replace("PORT", str(free_port())) for word in words), *training]
        command += ["--processes=2"] if name == "processes" else []
        done = subprocess.run(command, env=environment(), cwd=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert rows(folders[0]) == rows(folders[1]) == rows(folders[2])


PORTS = {"torchrun": "--master_port=PORT", "accelerate": "--main_process_port=PORT"}
LAUNCHERS = {
    "processes": ["agents.cli"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", PORTS["torchrun"], "-m", "agents.cli"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
        *("--dynamo_backend=no", PORTS["accelerate"], "-m", "agents.cli"),
    ],
}
