"""The examples, each run from top to bottom with `--smoke`, as a user would start it."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.command import ROOT
from tests.helpers.models import seldom


def run(*command, timeout=200, **environment):
    """Run an example in its own process, and return its output; the limit is in seconds."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


ALL_HELP = """
import contextlib, runpy, sys
sys.path.insert(0, "examples")  # as for a script
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.slow
def test_help_says_how_to_run_it():
    names = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    out = run("-c", ALL_HELP, *(f"examples/{name}" for name in names))  # in one process, as each would load torch
    assert [name for name in names if f"python examples/{name}" not in out] == []


def test_hello_env():
    out = run("examples/hello_env.py", "--smoke")
    assert "hello  |" in out
    assert "mean reward" in out


@pytest.mark.slow
def test_custom_reward():
    assert run("examples/custom_reward.py", "--smoke").count("mean reward") == 3


@pytest.mark.slow
def test_masked_json():
    pytest.importorskip("llguidance")
    assert run("examples/masked_json.py", "--smoke").count("100% valid") == 2


@pytest.mark.parametrize("seed", seldom(range(3), n=0))
def test_masked_json_learns_and_without_the_mask_it_does_not(tmp_path, seed):
    pytest.importorskip("llguidance")
    figures = {}
    for options in ((), ("--no-mask",)):
        run("examples/masked_json.py", "--seed", seed, "--json", tmp_path / "figures.json", *options)
        figures[options] = json.loads((tmp_path / "figures.json").read_text())
    masked, free = figures[()], figures["--no-mask",]
    assert masked["before"]["valid"] == masked["after"]["valid"] == 1.0
    assert masked["before"]["rating"] < 60 and masked["after"]["rating"] > 90
    assert free["before"]["valid"] < 0.05 and free["after"]["valid"] < 0.05


@pytest.mark.slow
def test_quickstart_writes_figures_curves_and_a_model(tmp_path):
    figures = tmp_path / "figures.json"
    out = tmp_path / "out"
    printed = run(
        "examples/quickstart.py", "--smoke", "--seed", 3, "--out", out, "--json", figures, TEXTENV_CACHE=str(tmp_path)
    )
    assert "before" in printed
    keys = {"reward_before", "reward_after", "parse_rate", "distinct", "seconds", "tokens_per_second"}
    assert json.loads(figures.read_text()).keys() == keys
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_distill_writes_three_models_and_figures(tmp_path):
    figures = tmp_path / "figures.json"
    printed = run("examples/distill.py", "--smoke", "--out", tmp_path, "--json", figures, TEXTENV_CACHE=str(tmp_path))
    assert "nats a token before" in printed
    assert json.loads(figures.read_text())["mood"].keys() == {"teacher", "student", "distilled"}


@pytest.mark.parametrize("seed", seldom(range(3), n=0))
def test_distill_meets_its_bar_and_without_a_teacher_it_does_not(tmp_path, seed):
    """The mood follows the teacher's, though no reward is seen; with the teacher switched off, nothing moves."""
    found = {}
    for options in ((), ("--off",)):
        run("examples/distill.py", "--seed", seed, "--out", tmp_path, "--json", tmp_path / "figures.json", *options)
        found[options] = json.loads((tmp_path / "figures.json").read_text())
    taught, off = found[()], found["--off",]
    assert taught["after"] < 0.5 * taught["before"] and off["after"] > 0.8 * off["before"]
    assert taught["mood"]["distilled"] > taught["mood"]["student"] + 0.2
    assert abs(off["mood"]["distilled"] - off["mood"]["student"]) < 0.1


@pytest.mark.long
def test_quickstart_on_a_corpus_and_resumed(tmp_path):
    pytest.importorskip("vaderSentiment")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the film was a great joy to watch\nthe plot is a sad and dreadful mess\n" * 200)
    command = ("examples/quickstart.py", "--smoke", "--corpus", corpus, "--out", tmp_path / "out")
    assert "resumed" not in run(*command, "--tokens", 3072)
    assert "resumed" in run(*command, "--tokens", 6144, "--resume")


@pytest.mark.parametrize("seed", seldom(range(5)))
def test_quickstart_meets_its_bar(tmp_path, seed):
    """The full job: the reward goes from 0.5 to at least 0.95, and the texts follow the grammar and differ."""
    figures = tmp_path / "figures.json"
    run("examples/quickstart.py", "--seed", seed, "--out", tmp_path / "out", "--json", figures)
    result = json.loads(figures.read_text())
    assert abs(result["reward_before"] - 0.5) <= 0.1
    assert result["reward_after"] >= 0.95
    assert result["parse_rate"] >= 0.8
    assert result["distinct"] >= 150


WRONG = """
import contextlib, io, runpy, sys
sys.path.insert(0, "examples")  # as for a script
for line in sys.argv[1:]:
    sys.argv = line.split()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(line, "|", end.code, errors.getvalue().splitlines()[-1:])
"""


@pytest.mark.slow
def test_wrong_paths_and_numbers_end_with_one_line_and_create_no_folder(tmp_path):
    """The corrected command can then use the same --out."""
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    wanted = {
        f"examples/reviews.py --model m --out {out} --data {tmp_path / 'empty'}": "--data: Expected the files rt-",
        f"examples/steering.py --model m --out {out} --prompts nowhere.txt": "--prompts and --held_out together",
        f"examples/hh.py --out {out} --data {tmp_path / 'empty'}": "--data: Expected files that end in .jsonl",
        f"examples/dailydialog.py --out {out} --data {tmp_path / 'empty'}": "--data: Expected",
        f"examples/zh_reviews.py --out {out} --data {tmp_path / 'empty'}": "--data: Expected",
        f"examples/quickstart.py --out {out} --tokens 0": "Expected --tokens of 1 or more, got 0.",
        f"examples/quickstart.py --out {out} --corpus nowhere.txt": "behind --corpus, got nowhere.txt, which is none.",
        f"examples/synthetic.py --out {out} --tokens -1": "Expected --tokens of 1 or more, got -1.",
        f"examples/remote_backend.py --out {out} --lanes 0": "Expected --lanes of 1 or more, got 0.",
    }
    stderr = dict(line.split(" | ", 1) for line in run("-c", WRONG, *wanted).splitlines() if " | " in line)
    assert [line for line, words in wanted.items() if words not in stderr.get(line, "")] == []
    assert not out.exists()
