"""A search finds what a wrong setting lacks: the demo's bar, at a bounded divergence."""

import json

import pytest

from agents.cli import main as cli
from agents.configuration.search import read_ranges
from agents.runs.study import Study
from tests.helpers.command import ROOT, run

FILE = ROOT / "examples" / "configs" / "searches" / "demo.yml"
BAR = 0.9  # of .ci/bare.py


def evaluated(folder):
    return json.loads((folder / "results.json").read_text())["after"]["figures"]["reward"]


@pytest.mark.long
def test_a_search_meets_the_bar_that_a_wrong_learning_rate_does_not(tmp_path):
    more = ["--device=cpu", "--loggers=[]", "--quiet"]
    assert run("tune", FILE, "--trials=8", "--out", tmp_path / "search", *more) == 0
    config, _, _ = cli.train_config([str(FILE)], "tune")
    study = Study(tmp_path / "search", config, read_ranges(config.tune.ranges))
    table = study.rows()
    best = study.best(table)
    assert best["figures"]["reward"] >= BAR and best["figures"]["kl"] <= 10.0
    assert evaluated(tmp_path / "search" / "trials" / f"{best['trial']:03}") == best["figures"]["reward"]
    # The bound keeps out models whose reward is high, but which are far from the start: some repeat two words.
    figures = [row["figures"] for row in table if row["state"] == "over max_kl"]
    assert any(of["kl"] > 10.0 and of["reward"] > 0.9 for of in figures), table
    # As the file has it, the demo learns nothing.
    wrong = ["--algorithm.learning_rate=1e-7", f"--total_tokens={config.total_tokens}"]
    assert run("train", *wrong, "--out", tmp_path / "wrong", *more) == 0
    assert evaluated(tmp_path / "wrong") < 0.7 < BAR
