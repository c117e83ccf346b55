"""The reading of a run's folder, whole or damaged, and the order of what is found in it."""

import json
import os

import pytest

from agents.diagnosis import CATALOGUE, Diagnosis, diagnose
from agents.errors import CommandError

ERROR = "RuntimeError: a callback has failed, a number is 3."
TRACE = f"2026-01-01T00:00:00+00:00\nTraceback (most recent call last):\n  File 'x.py', line 1\n{ERROR}\n\n"


def make_run(folder, rows=(), log="", **files):
    """Write a run's folder: rows of metrics.jsonl, log.txt, and other files by name with "_" for the dot."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    if log:
        (folder / "log.txt").write_text(log)
        os.utime(folder / "metrics.jsonl", (0, 0))
    return folder


def ids(folder):
    return [finding.id for finding in diagnose(folder)]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CommandError, match=r"Expected the folder of a run, with run\.json, got"):
        diagnose(tmp_path)


def test_a_run_without_rows_has_no_finding(tmp_path):
    assert diagnose(make_run(tmp_path / "run")) == []


def test_the_error_that_ended_a_run_is_named(tmp_path):
    (finding,) = diagnose(make_run(tmp_path / "run", [{"tokens": 64}], TRACE))
    assert finding.id == "crashed" and finding.evidence == f"after 64 tokens: {ERROR}"
    assert finding.cure == CATALOGUE["crashed"].cure


def test_an_error_that_the_run_has_left_behind_is_not_named(tmp_path):
    run = make_run(tmp_path / "run", [{"tokens": 64}], TRACE)
    os.utime(run / "log.txt", (0, 0))
    os.utime(run / "metrics.jsonl", (1, 1))  # rows were written after the error
    assert ids(run) == []
    assert ids(make_run(tmp_path / "done", [{"tokens": 64}], TRACE, results_json="{}")) == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics_jsonl", '{"tokens": 1}\n{"tokens": x}\n{"tokens": 3}\n', "line 2 of"),
        ("samples_jsonl", '{"tokens": 1}\n', "`prompt` in line 1 of"),
        ("history_json", '{"figures": 1}', "Expected a list"),
        ("config_yml", "a: [", "Expected plain YAML in"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path, name, text, words):
    (finding,) = diagnose(make_run(tmp_path / "run", **{name: text}))
    assert finding.id == "damaged-file" and words in finding.evidence


def test_a_half_written_last_line_is_no_damage(tmp_path):
    assert ids(make_run(tmp_path / "run", metrics_jsonl='{"tokens": 1}\n{"tok')) == []


def test_a_finding_has_the_words_of_its_cause():
    finding = Diagnosis.of("reward-slow", 0.5, "80 % of the time")
    cause = CATALOGUE["reward-slow"]
    assert (finding.cause, finding.why, finding.cure, finding.source) == (cause.title, *cause[2:])
