"""The report of runs: its data, from run folders that are written by hand, and its file."""

import configparser
import json
import re

import numpy as np
import pytest

from agents import SeedComparison, SeedTable
from agents.diagnosis import diagnose
from agents.evaluation.prompt_scores import scores_in
from agents.report.figures import columns, total_seconds
from agents.report.page import SCRIPTS, inert_json, page
from agents.report.report import report_data, write_report
from agents.report.run_data import read_run
from agents.report.samples import sample_tables
from agents.report.several import together
from agents.report.summary import changes, sentences
from agents.report.words import words
from tests.agents.report.made_runs import PROMPTS, SIZE, data_of, made_run, row_of
from tests.helpers.command import ROOT, run, settings


@pytest.fixture
def folder(tmp_path):
    return made_run(tmp_path / "mine")


# What happened


def test_five_sentences_tell_what_happened(folder):
    data = read_run(folder)
    said = [sentence.en for sentence in sentences(data, changes(data.scores))]
    assert said[0] == (
        "PPO trained the model gpt2 (LoRA adapters) on the task text, with the reward vader, on the prompts of "
        "prompts.txt: 384 tokens in 6 iterations, seed 0."
    )
    assert said[1].startswith("The reward of 4 evaluated prompts went from 0.250 to 0.750, by +0.500 [+0.")
    assert said[1].endswith(
        "95 % interval over prompts): a rise that chance in the choice of prompts does not explain."
    )
    assert said[2] == (
        "Texts went from 10.0 to 14.2 tokens, the share of those that ended by themselves from 75 % to 75 %, the "
        "entropy of a token from 2.00 to 1.17 nats and their divergence from the reference to 1.67 nats a text."
    )
    # The row before the first has an evaluation of 0.5 s, in the first 2 of the 12 seconds.
    assert said[3] == (
        "It took 12 s at 32 tokens a second: 50 % for updates, 12 % for the reward, 4 % for evaluations, 33 % for "
        "writing texts."
    )
    assert said[4] == "It is finished; the best model by reward, 0.750, is that of 384 tokens."


def test_both_languages_have_the_same_numbers(folder):
    data = read_run(folder)
    for sentence in sentences(data, changes(data.scores)):
        numbers = [sorted(re.findall(r"\d[\d,.]*\d|\d", text)) for text in sentence]
        assert numbers[0] == numbers[1], sentence
        assert re.search("[\u4e00-\u9fff]", sentence.zh) and not re.search("[\u4e00-\u9fff]", sentence.en)


@pytest.mark.parametrize(
    ("rewards", "verdict"),
    [((0.25, 0.1, 0.5, 0.2), "no change that these prompts can show"), ((0.0, -1.0, 0.1, 0.0), "a fall that chance")],
)
def test_the_verdict_is_the_intervals(tmp_path, rewards, verdict):
    data = read_run(made_run(tmp_path / "run", rewards=rewards))
    assert verdict in sentences(data, changes(data.scores))[1].en


def test_a_run_that_broke_off_tells_how_far_it_came(folder):
    for name in ("results.json", "scores.json", "history.json", "samples.jsonl", "best/best.json"):
        (folder / name).unlink()
    (folder / "config.yml").write_text("{total_tokens: 1000}")
    data = read_run(folder)
    said = [sentence.en for sentence in sentences(data, changes(data.scores))]
    assert said[1] == "It has not been evaluated twice; the reward of the training texts went from 0.200 to 0.700."
    assert said[4] == "It is not finished: it stands at 384 / 1,000 tokens."
    (folder / "metrics.jsonl").write_text("")
    assert report_data([folder])["runs"][0]["summary"]["en"][3] == "What it cost was not recorded."


def test_an_early_stop_is_told(tmp_path):
    data = read_run(made_run(tmp_path / "run", config={"total_tokens": 10_000}))
    assert sentences(data, {})[4].en.startswith("It stopped early, at 384 / 10,000 tokens; the best model")


def test_the_page_has_what_the_doctor_finds(folder):
    assert report_data([folder])["runs"][0]["findings"] == []
    (folder / "log.txt").write_text("Traceback (most recent call last):\nValueError: broken\n")
    (folder / "results.json").unlink()
    found = report_data([folder])["runs"][0]["findings"]
    assert [one["id"] for one in found] == [one.id for one in diagnose(folder)] and found[0]["id"] == "crashed"
    assert all(one[name] for one in found for name in ("cause", "evidence", "cure"))


# Figures


def test_curves_are_the_rows(folder):
    run_data = report_data([folder])["runs"][0]
    assert run_data["x"] == [0, *(SIZE * (i + 1) for i in range(6))] and run_data["rows_per_point"] == 1
    rows = [row_of(i, 6) for i in range(6)]
    for key in ("reward/task", "train/loss", "train/entropy_loss"):
        assert run_data["figures"][key] == [
            None,
            *(None if row[key] is None else pytest.approx(row[key], rel=1e-4) for row in rows),
        ]
    shares = [run_data["figures"][f"share/{name}"][1] for name in ("update", "reward", "evaluation", "rest")]
    assert shares == [0.5, 0.125, 0.25, 0.125], "the evaluation before the first rollout took 0.5 s of 2 s"
    assert "train/aggregation" not in run_data["figures"] and "tokens" not in run_data["figures"]
    reward = run_data["evaluations"]["reward"]
    assert (reward["x"], reward["y"]) == ([0, 384], [0.25, 0.75])
    assert reward["low"][1] < 0.75 < reward["high"][1]


def test_a_long_run_keeps_a_thousand_points_of_means():
    rows = [{"tokens": i + 1, "a": float(i % 2)} for i in range(2500)]
    kept = columns(rows)
    assert kept.rows_per_point == 3 and len(kept.x) == 834 and kept.x[-1] == 2500
    assert kept.figures["a"][:2] == [pytest.approx(1 / 3, rel=1e-4), pytest.approx(2 / 3, rel=1e-4)]
    assert np.mean(kept.figures["a"]) == pytest.approx(0.5, abs=1e-3)


def test_the_seconds_are_those_of_all_iterations():
    rows = [
        {"tokens": 0},
        {"tokens": 64, "time/tokens_per_second": 32.0},
        {"tokens": 96, "time/tokens_per_second": 8.0},
    ]
    assert total_seconds(rows) == 6.0


# Samples


def test_samples_stand_by_prompt_and_table(folder):
    kept = report_data([folder])["runs"][0]["samples"]
    assert kept["prompts"] == list(PROMPTS) and [table["tokens"] for table in kept["tables"]] == [0, 384]
    assert [table["cells"][0]["text"] for table in kept["tables"]] == [" good film .", " very good film !"]


def test_samples_keep_to_their_budget():
    rows = [
        {"tokens": at, "prompt": prompt, "text": "x" * 100, "end_reason": "eos", "reward": 1.0}
        for at in range(100)
        for prompt in "abcdefghij"
    ]
    kept = sample_tables(rows, budget=5_000)
    assert [table["tokens"] for table in kept["tables"]] == [0, 25, 50, 74, 99] and kept["n_tables"] == 100
    kept = sample_tables(rows, budget=700)
    assert kept["prompts"] == ["a", "b", "c"] and [table["tokens"] for table in kept["tables"]] == [0, 99]


def test_a_prompt_that_stands_twice_in_a_table_has_two_rows():
    rows = [{"tokens": 0, "prompt": "a", "text": text, "end_reason": "eos", "reward": 1.0} for text in "xy"]
    kept = sample_tables(rows)
    assert kept["prompts"] == ["a", "a"] and [cell["text"] for cell in kept["tables"][0]["cells"]] == ["x", "y"]


# Several runs


@pytest.fixture
def seeds(tmp_path):
    """Two folders, of two seeds and of one, with other learning rates."""
    rewards = {"a/seed_0": (1.0, 0.9, 0.8, 1.0), "a/seed_1": (0.8, 0.9, 0.9, 0.7), "b/seed_0": (0.2, 0.1, 0.2, 0.1)}
    for i, (name, row) in enumerate(rewards.items()):
        config = {"algorithm.learning_rate": 1e-3} if name[0] == "b" else {}
        seed, noise = int(name[-1]), np.full(6, 0.1 * i)
        made_run(tmp_path / name, config=config, seed=seed, rewards=row, noise=noise)
    return tmp_path / "a", tmp_path / "b"


def test_several_runs_have_bands_tables_and_differences(seeds):
    data = report_data(seeds)
    assert [run["name"] for run in data["runs"]] == ["a/seed_0", "a/seed_1", "b"]
    first = data["groups"][0]["figures"]["reward/task"]
    assert first["x"][0] == SIZE, "the row before the first iteration has no reward"
    assert (first["low"][0], first["y"][0], first["high"][0]) == (0.2, pytest.approx(0.25), pytest.approx(0.3))
    scores = {path: [scores_in(one) for one in sorted(path.iterdir())] for path in seeds}
    last, before = ([one[at] for one in scores[seeds[0]]] for at in (384, 0))
    expected = SeedTable(last, before, ["0", "1"]).figures["reward"]
    row = data["tables"][0]["table"]["figures"][0]
    assert row["difference"] == pytest.approx(list(expected.difference), rel=1e-4)
    assert row["seeds"] == [pytest.approx(list(one), rel=1e-4) for one in expected.seeds]
    compared = SeedComparison(last, [one[384] for one in scores[seeds[1]]]).figures["reward"]
    row = data["comparisons"][0]["figures"][0]
    assert row["probability"] == pytest.approx(list(compared.probability), rel=1e-4) and row["higher"] == "a"
    assert data["differences"] == [["algorithm.learning_rate", "0.0001", "0.001"], ["seed", "0, 1", "0"]]


def test_runs_with_other_points_are_interpolated():
    curve = together([([0, 10, 20], [0.0, None, 2.0]), ([5, 25], [1.0, 3.0])])
    assert curve == {"x": [20], "y": [2.25], "low": [2.0], "high": [2.5]}
    assert together([([0], [1.0]), ([0], [None])]) is None


def test_a_single_folder_of_seeds_is_a_group(seeds):
    data = report_data([seeds[0]])
    assert len(data["groups"]) == 1 and data["comparisons"] == [] and data["differences"] == [["seed", "0, 1"]]


# The page


def test_texts_are_inert_in_the_file(tmp_path):
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)"><!-- \u2028 \ud800 \x00'
    texts = [[evil] * 4, [evil] * 4]
    folder = made_run(tmp_path / "run", texts=[[" a"] * 4] * 2)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    (folder / "samples.jsonl").write_text("".join(json.dumps({**line, "text": evil}) + "\n" for line in lines))
    file = write_report([folder])
    assert texts and file.read_bytes().count(b"<script") == 2 and b"<img" not in file.read_bytes()
    kept = data_of(file)["runs"][0]["samples"]["tables"][0]["cells"][0]["text"]
    assert kept == evil.replace("\ud800", "?")


def test_the_page_loads_nothing_and_names_its_own_script(folder):
    text = write_report([folder]).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not re.findall(r'(?:src|href|url\()\s*=?\s*["\']?(?:https?:|//)', text)


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        inert_json({"a": float("nan")})


def test_the_wheel_has_the_scripts_and_the_style():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["agents.report"].split() == ["static/*"]
    files = {path.name for path in (ROOT / "agents" / "report" / "static").iterdir()}
    assert files == {*SCRIPTS, "page.html", "report.css"}


def test_every_word_of_the_scripts_is_in_both_languages():
    text = page("title", {})
    used = set(re.findall(r'\bt\("(\w+)"', text.split("<script>")[1]))
    assert len(used) > 40
    for language in words().values():
        assert used <= language.keys()
    assert all(words()["en"].values()) and all(words()["zh"].values())


def test_a_run_of_500_iterations_is_below_three_megabytes(tmp_path):
    long = " a rather long word by word text of the policy ." * 40
    folder = made_run(tmp_path / "run", n=500, texts=[[long] * 4] * 51)
    assert write_report([folder]).stat().st_size < 3_000_000


def test_a_page_of_twelve_such_runs_is_below_three_megabytes(tmp_path):
    for folder in "ab":
        for seed in range(6):
            made_run(tmp_path / folder / f"seed_{seed}", n=500, seed=seed, texts=[[" some text ." * 40] * 4] * 51)
    assert write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").stat().st_size < 3_000_000


# The commands


def test_train_writes_the_report_and_its_last_line_says_where(model, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", *settings(model, out, 2), "--watch") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.html'}"
    data = data_of(out / "report.html")
    assert data["live"] is None and data["runs"][0]["summary"]["en"][4].startswith("It is finished")
    (out / "report.html").unlink()
    assert run("report", out) == 0
    again = data_of(out / "report.html")
    assert {**again, "made": ""} == {**data, "made": ""}
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    shares = {name: again["runs"][0]["figures"][f"share/{name}"] for name in ("update", "reward", "evaluation", "rest")}
    assert sum(share[2] for share in shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares["update"][1] < shares["update"][2], "there is no update before the first rollout"
    assert shares["evaluation"][2] == 0 < shares["evaluation"][1] and shares["reward"][1] > 0


def test_watch_writes_pages_that_load_again_until_the_run_ends(folder, monkeypatch, capsys):
    (folder / "results.json").unlink()
    lives = []

    def sleep(seconds):
        lives.append(data_of(folder / "report.html")["live"])
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"tokens": 1000 + len(lives)}) + "\n")
        if len(lives) == 2:
            (folder / "results.json").write_text("{}")

    monkeypatch.setattr("agents.cli.report.time.sleep", sleep)
    assert run("report", folder, "--watch") == 0
    data = data_of(folder / "report.html")
    assert lives == [5, 5] and data["live"] is None and data["runs"][0]["x"][-2:] == [1001, 1002]


@pytest.mark.parametrize("name", ["notes.txt", ""])
def test_a_report_replaces_nothing_but_a_report(folder, capsys, name):
    (folder / "notes.txt").write_text("mine")
    assert run("report", folder, "--out", folder / name) == 2
    assert "Expected a new file, or a page to replace" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"


def test_damage_is_named(folder, capsys):
    (folder / "history.json").write_text('[{"num_timesteps": "x"}]')
    assert run("report", folder) == 2
    assert "history.json" in capsys.readouterr().err and not (folder / "report.html").exists()


def test_a_report_that_cannot_be_written_costs_a_line(model, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", *settings(model, out, 1), "--quiet") == 0
    (out / "results.json").unlink()
    (out / "report.html").write_text("mine")
    assert run("train", "--resume", out) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no report: Expected a new file")
    assert (out / "results.json").is_file()
