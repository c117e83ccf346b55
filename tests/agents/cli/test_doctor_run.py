"""The command `textenv doctor RUN`: what it prints, its JSON and its exit code."""

import json

from agents.diagnosis import diagnose
from tests.agents.diagnosis.test_diagnose import ERROR, TRACE, make_run
from tests.helpers.command import run


def test_a_finding_is_printed_with_its_cure_and_the_code_is_1(tmp_path, capsys):
    folder = make_run(tmp_path / "run", [{"tokens": 64}, {"tokens": 1280}], TRACE)
    assert run("doctor", folder) == 1
    said = capsys.readouterr().out
    assert "2 rollouts, 1,280 tokens. 1 likely cause:" in said
    (finding, *_) = diagnose(folder)
    words = " ".join(said.split())
    assert ERROR in words and finding.cure in words and finding.source in words


def test_json_is_one_line_with_all_findings(tmp_path, capsys):
    folder = make_run(tmp_path / "run", [{"tokens": 64}], TRACE)
    assert run("doctor", folder, "--json") == 1
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert (said["run"], said["tokens"]) == (str(folder), 64)
    assert [finding["id"] for finding in said["findings"]] == [finding.id for finding in diagnose(folder)]


def test_a_run_without_a_fault_has_code_0(tmp_path, capsys):
    assert run("doctor", make_run(tmp_path / "run", [{"tokens": 64}])) == 0
    assert "Nothing in its figures and texts" in capsys.readouterr().out


def test_control_characters_of_a_run_have_no_effect(tmp_path, capsys):
    assert run("doctor", make_run(tmp_path / "run", [{"tokens": 64}], TRACE.replace("a number", "\x1b[31m"))) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert run("doctor", tmp_path) == 2
    assert "Expected the folder of a run" in capsys.readouterr().err


def test_the_runs_of_a_folder_of_seeds_are_asked_for(tmp_path, capsys):
    make_run(tmp_path / "seed_0")
    assert run("doctor", tmp_path) == 2
    assert "name one of them" in capsys.readouterr().err
