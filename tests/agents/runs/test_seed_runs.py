"""`textenv train --seeds`: each seed's run is the single run; the table of all; stops, failures and refusals."""

import json
import re
import shutil
import signal

import pytest

from agents.errors import CommandError, Exit
from agents.runs import seeds as several
from tests.helpers.command import (
    ROLLOUT,
    interrupt_after,
    refused,
    rows,
    run,
    same_runs,
    settings,
    start,
    wait_for_rows,
)

ROLLOUTS = 2
MORE = {"loggers": "[curves]", "evaluation.judge": "{id: length, args: {target: 3}}"}


def words(model, out, *seeds, **more):
    """Return the command for several seeds."""
    return ["train", *settings(model, out, ROLLOUTS, **more), "--seeds", *map(str, seeds)]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """The folder of two seeds that were never stopped."""
    out = tmp_path_factory.mktemp("runs") / "made"
    assert run(*words(model, out, 3, 1, **MORE), "--quiet") == 0
    return out


def test_e10_a_seeds_run_is_the_single_run(made, model, tmp_path):
    """The seed before it in the same process has left nothing behind, bit for bit."""
    alone = tmp_path / "alone"
    assert run("train", *settings(model, alone, ROLLOUTS, **MORE), "--seed", "1", "--quiet") == 0
    same_runs(made / "seed_1", alone)
    ours, single = ((folder / "config.yml").read_text() for folder in (made / "seed_1", alone))
    assert ours == single.replace(f"out: {alone}", f"out: {made / 'seed_1'}") and "\nseed: 1\n" in ours
    assert rows(made / "seed_3") != rows(alone), "another seed is another run"


def test_a_table_and_a_picture_of_all_seeds(made):
    assert {path.name for path in made.iterdir()} == {
        "seed_1",
        "seed_3",
        "seeds.md",
        "seeds.json",
        "seeds.png",
        "report.html",
    }
    text, numbers = (made / "seeds.md").read_text(), json.loads((made / "seeds.json").read_text())
    assert "| figure | mean before | mean after | difference | IQM before | IQM after |" in text
    assert "| figure | seed 3 | seed 1 | lowest to highest | width of one interval |" in text
    assert "2 seeds, 8 prompts. " in text and "such an interval contains the true mean in 50 % of all cases" in text
    assert text.count("\n| judge | ") == 2 and set(numbers["figures"]) == {"length", "reward", "judge"}
    assert (made / "seeds.png").read_bytes().startswith(b"\x89PNG")
    reward = numbers["figures"]["reward"]
    for seed in (3, 1):
        results = json.loads((made / f"seed_{seed}" / "results.json").read_text())
        assert reward["seeds"][str(seed)]["value"] == pytest.approx(results["after"]["figures"]["reward"])
    of_seeds = [reward["seeds"][seed]["value"] for seed in ("3", "1")]
    assert reward["after"]["value"] == pytest.approx(sum(of_seeds) / 2)
    assert reward["lowest_to_highest"] == pytest.approx(abs(of_seeds[0] - of_seeds[1]))


@pytest.mark.slow
def test_finished_seeds_are_left_out(made, model, tmp_path, capfd):
    out = shutil.copytree(made, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "seed_" in str(path)}
    table = (out / "seeds.md").read_text()
    (out / "seeds.md").unlink()
    assert run(*words(model, out, 3, 1, **MORE), "--resume") == 0
    said = capfd.readouterr().out
    assert f"finished already: {out / 'seed_3'}" in said and f"finished already: {out / 'seed_1'}" in said
    assert table in f"{said}\n" and (out / "seeds.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_stopped_seed_is_continued_and_the_table_is_the_unbroken_one(made, model, tmp_path, monkeypatch, capfd):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0, "seed_1")
        assert run(*words(model, out, 3, 1, **MORE), "--quiet") == 130
    line = capfd.readouterr().err.splitlines()[-1]
    how = "continue with: the same command with --resume"
    assert line == f"textenv: seed 1: stopped after {ROLLOUT} tokens, saved; {how}"
    assert (out / "seed_3" / "results.json").is_file() and not (out / "seeds.md").exists()
    assert "add --resume to continue" in refused(capfd, *words(model, out, 3, 1))
    assert run(*words(model, out, 3, 1, **MORE), "--quiet", "--resume") == 0
    for seed in ("seed_3", "seed_1"):
        same_runs(made / seed, out / seed)
    assert (out / "seeds.json").read_text() == (made / "seeds.json").read_text()


@pytest.mark.slow
def test_a_finished_seed_whose_configuration_changes_is_trained_on(made, model, tmp_path, capfd):
    out = shutil.copytree(made / "seed_1", tmp_path / "more" / "seed_1").parent
    longer = [*words(model, out, 1, **MORE, total_tokens=3 * ROLLOUT), "--resume", "--quiet"]
    assert run(*longer) == 2
    assert "seed 1: Expected the configuration of" in (said := capfd.readouterr().err)
    assert "add --change total_tokens" in said
    assert run(*longer, "--change", "total_tokens") == 0
    assert rows(out / "seed_1")[-1]["tokens"] == 3 * ROLLOUT


# Failures, with runs that do nothing


def fakes(monkeypatch, fails):
    """Replace runs and the table; return the lists of started seeds and of tables. `fails` maps seeds to errors."""
    started, tables = [], []

    def start(config, dumped, options, reporter=None):
        started.append(config.seed)
        if config.seed in fails:
            raise fails[config.seed]
        return 0

    monkeypatch.setattr(several, "start", start)
    monkeypatch.setattr(several, "_finish", lambda plans, options, reporter: tables.append(plans))
    return started, tables


@pytest.mark.parametrize("code", [Exit.NUMERICS, Exit.REWARD])
def test_a_seed_that_fails_is_named_and_the_others_are_trained(code, model, tmp_path, monkeypatch, capfd):
    started, tables = fakes(monkeypatch, {1: CommandError("Expected finite weights, got a NaN.", code)})
    assert run(*words(model, tmp_path / "out", 0, 1, 2)) == code
    assert started == [0, 1, 2] and not tables, "a table of the survivors alone would be too good"
    first, last = capfd.readouterr().err.splitlines()
    assert first == "textenv: seed 1: Expected finite weights, got a NaN."
    assert "1 of 3 seeds failed, seed 1, and no table is written" in last and "--seeds 0 2 --resume" in last


@pytest.mark.parametrize("code", [Exit.REFUSED, Exit.STORAGE, Exit.SIGNAL + signal.SIGTERM])
def test_after_other_errors_no_further_seed_is_started(code, model, tmp_path, monkeypatch, capfd):
    started, tables = fakes(monkeypatch, {1: CommandError("The disk is full.", code)})
    assert run(*words(model, tmp_path / "out", 0, 1, 2)) == code
    assert started == [0, 1] and not tables
    assert capfd.readouterr().err == "textenv: seed 1: The disk is full.\n"


def test_ctrl_c_between_two_runs_says_how_to_go_on(model, tmp_path, monkeypatch, capfd):
    started, _ = fakes(monkeypatch, {1: KeyboardInterrupt()})
    assert run(*words(model, tmp_path / "out", 0, 1, 2)) == 130
    how = "interrupted; continue with: the same command with --resume"
    assert started == [0, 1] and capfd.readouterr().err == f"textenv: {how}\n"


# Arguments


def test_seeds_on_the_command_line_replace_the_one_of_a_file(model, tmp_path, monkeypatch):
    started, tables = fakes(monkeypatch, {})
    (tmp_path / "own.yml").write_text("seed: 7\ntotal_tokens: 9\nout: runs/own\n")
    assert run("train", tmp_path / "own.yml", "--seeds", "2", "0", "--seeds", "5") == 0
    assert started == [2, 0, 5]
    assert [plan.config.out for plan in tables[0]] == [f"runs/own/seed_{seed}" for seed in (2, 0, 5)]
    assert all(plan.config.total_tokens == 9 for plan in tables[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0", "1", "--seed", "1", "--out", "x"], "Expected --seeds or --seed, got both"),
        (["--seeds", "0", "--seed=1", "--out", "x"], "Expected --seeds or --seed, got both"),
        (["--seeds", "2", "0", "2", "--out", "x"], "Expected each seed once, got --seeds with 2 again"),
        (["--out", "x", "--seeds=-1"], "Expected seeds of 0 or more, got -1"),
        (["--seeds", "0", "1"], "Expected --out FOLDER with --seeds"),
        (["--seeds", "0", "--out", "x", "--resume", "y"], "Expected --resume without a folder with --seeds, got y"),
        (["--seeds", "0", "one", "--out", "x"], "argument --seeds: invalid int value: 'one'"),
        (["--seeds", "--out", "x"], "argument --seeds: expected at least one argument"),
        (["--out", "x", "--resume"], "Expected --resume RUN, the folder of a run, got --resume alone"),
        (["--seeds", "0", "--out", "x", "--total_token", "3"], "total_token"),
    ],
)
def test_what_does_not_fit_seeds_is_refused(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, "train", *arguments)


def test_a_file_cannot_set_seeds(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yml").write_text("seeds: [0, 1]\n")
    assert "only on the command line" in refused(capfd, "train", "own.yml")


def test_the_folder_of_seeds_is_no_run(made, capfd):
    assert run("train", "--resume", made) == 2
    assert "which has one run for each seed: name one of them, or repeat the command" in capfd.readouterr().err


def test_a_dry_run_of_seeds_is_one_and_multiplies(model, tmp_path, capfd):
    assert run(*words(model, tmp_path / "out", 0, 1, 2), "--dry-run", "--quiet") == 0
    said = capfd.readouterr().out
    assert len(re.findall("^rollout of", said, flags=re.MULTILINE)) == 1
    assert "all 3 seeds, one after the other: about 0:00:0" in said and not (tmp_path / "out").exists()


def test_a_dry_run_resumes_nothing(made, model, capfd):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert run(*words(model, made, 3, 1, total_tokens=9 * ROLLOUT), "--resume", "--dry-run") == 0
    assert run("train", "--resume", made / "seed_1", "--dry-run") == 0
    said = capfd.readouterr().out
    assert said.count("the whole run") == 2 and said.count("all 2 seeds") == 1
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.slow
def test_lines_of_json_have_the_seed_and_the_last_one_the_table(made, model, tmp_path, capfd):
    out = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(out / "seed_1")
    assert run(*words(model, out, 3, 1, **MORE), "--resume", "--json") == 0
    *lines, last = map(json.loads, capfd.readouterr().out.splitlines())
    assert [(line["seed"], line["tokens"]) for line in lines] == [(1, n * ROLLOUT) for n in range(ROLLOUTS + 1)]
    assert last["seeds"] == json.loads((out / "seeds.json").read_text())


@pytest.mark.slow  # a process of its own
def test_ctrl_c_twice_stops_at_once_and_the_same_command_goes_on(made, model, tmp_path):
    out = tmp_path / "twice"
    command = words(model, out, 3, 1, total_tokens=400 * ROLLOUT, **MORE)
    process = start(*command)
    wait_for_rows(process, out / "seed_3", 3)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert "continue with: the same command with --resume" in error.splitlines()[-1]
    assert not (out / "seed_1").exists()
    shorter = words(model, out, 3, 1, total_tokens=8 * ROLLOUT, **MORE)
    assert run(*shorter, "--resume", "--quiet", "--change", "total_tokens") == 0
    assert (out / "seeds.md").is_file() and rows(out / "seed_1")[-1]["tokens"] == 8 * ROLLOUT
