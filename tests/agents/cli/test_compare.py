"""`textenv compare`: runs and folders of seeds, from run folders that are written by hand."""

import json

import pytest

from agents import PromptScores, SeedComparison
from agents.evaluation.prompt_scores import write_scores
from tests.helpers.command import run
from textenv.metrics import mean_of

PROMPTS = ["The", "A", "This", "It"]


def made_run(folder, rewards, prompts=PROMPTS, finished=True):
    """Write what `compare` reads of a run, with the reward of each prompt in its last evaluation."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "started": "", "versions": {}, "git": {}}))
    lines = [{"tokens": tokens, "reward/task": tokens / 100} for tokens in (0, 64)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = {at: PromptScores(prompts, {"reward": mean_of(row)}) for at, row in ((0, [0.0] * 4), (64, rewards))}
    write_scores(folder / "scores.json", evaluations)
    if finished:
        (folder / "results.json").write_text("{}")
    return evaluations[64]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folders of two trainings of three and two seeds, and their last evaluations."""
    monkeypatch.chdir(tmp_path)
    better = [[1.0, 0.9, 0.8, 0.7], [0.9, 0.9, 0.9, 0.7], [0.8, 1.0, 0.9, 0.9]]
    worse = [[0.1, 0.2, 0.0, 0.1], [0.3, 0.1, 0.2, 0.0]]
    made = {
        name: [made_run(tmp_path / name / f"seed_{seed}", row) for seed, row in zip(seeds, rows, strict=True)]
        for name, seeds, rows in (("new", (0, 2, 10), better), ("old", (0, 1), worse))
    }
    return tmp_path, made


def test_two_folders_of_seeds(folders, capsys):
    _, made = folders
    assert run("compare", "new", "old") == 0
    said = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in said.splitlines()[2:7]] == [
        *("| new/seed_0", "| new/seed_2", "| new/seed_10"),  # by number
        *("| old/seed_0", "| old/seed_1"),
    ]
    expected = SeedComparison(made["new"], made["old"], ("new", "old"))
    assert expected.to_markdown() in said and expected.figures["reward"].higher == "a"
    assert "| 1.00 [1.00, 1.00] | new |" in said, "each seed of new is above each of old for each prompt"
    assert said.endswith("curves: compare.png\n") and "not finished" not in said


def test_each_other_folder_is_compared_with_the_first(folders, capsys):
    tmp_path, made = folders
    single = made_run(tmp_path / "single", [0.5] * 4, ["other"] * 4, finished=False)
    assert run("compare", "single", "old", "new/seed_2", "--out", "three.png") == 0
    said = capsys.readouterr().out
    for name in ("old", "seed_2"):
        theirs = made["old"] if name == "old" else made["new"][1:2]
        assert SeedComparison([single], theirs, ("single", name)).to_markdown() in said
    assert "P(old > seed_2)" not in said and said.count("; other prompts. ") == 2
    assert said.count("not finished, compared as they are: single") == 2
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_scores_are_drawn_and_not_compared(folders, capsys):
    tmp_path, _ = folders
    (tmp_path / "old" / "seed_1" / "scores.json").unlink()
    assert run("compare", "new", "old") == 0
    said = capsys.readouterr().out
    assert "not compared: old/seed_1 has no scores.json" in said and "P(new > old)" not in said


def test_folders_without_runs_are_refused(folders, capfd):
    tmp_path, _ = folders
    (tmp_path / "new" / "seed_x").mkdir()  # no seed
    (tmp_path / "new" / "seed_7").mkdir()  # has not begun
    assert run("compare", "new", "new") == 0
    (tmp_path / "empty" / "seed_0").mkdir(parents=True)
    assert run("compare", "new", "empty") == 2
    assert "Expected the folder of a run, got empty, which has no run.json" in capfd.readouterr().err
