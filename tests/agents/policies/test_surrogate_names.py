"""The surrogate and the aggregation that a configuration names: what is built, what is refused, and what logs say."""

import pytest

from agents import CISPO, GSPO, ClipHigher, DualClip, SoftGate
from agents.cli.main import train_config
from agents.configuration.config import Named
from agents.errors import CommandError
from agents.policies.surrogate_names import make_surrogate
from agents.policies.surrogates import SURROGATES
from agents.runs.folder import RunFolder, read_rows
from tests.helpers.command import ROLLOUT, rows, run, settings
from textenv.checks.trust import Trust

OWN = """
class Plain:
    def __init__(self, scale): self.scale = scale
    def __call__(self, terms): return terms.ratios
"""
BUILT = {
    "clip_higher": ClipHigher(0.2, 0.28),
    "dual_clip": DualClip(),
    "cispo": CISPO(),
    "gspo": GSPO(),
    "soft_gate": SoftGate(),
    "{id: clip_higher, args: {low: 0.1, high: 0.3}}": ClipHigher(0.1, 0.3),
    "{id: dual_clip, args: {most: 5}}": DualClip(most=5),
    "{id: cispo, args: {low: 0.5, high: 1.5}}": CISPO(0.5, 1.5),
    "{id: gspo, args: {high: 0.01}}": GSPO(high=0.01),
    "{id: soft_gate, args: {positive: 2.0}}": SoftGate(positive=2.0),
    "null": None,
}


def configured(word):
    return train_config([f"--algorithm.surrogate={word}"])[0].algorithm.surrogate


@pytest.mark.parametrize("word", BUILT)
def test_each_name_builds_its_class_with_the_given_options(word):
    assert make_surrogate(configured(word), Trust()) == BUILT[word]
    assert {name.split("id: ")[-1].split(",")[0] for name in BUILT} - {"null"} == SURROGATES.keys()


def test_a_class_of_ones_own_needs_permission(tmp_path, monkeypatch):
    (tmp_path / "own_surrogates.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = configured("{id: 'own_surrogates:Plain', args: {scale: 3}}")
    assert make_surrogate(named, Trust(("own_surrogates",))).scale == 3
    with pytest.raises(CommandError, match="--allow own_surrogates"):
        make_surrogate(named, Trust())


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("cspo", "Expected a surrogate among clip_higher, dual_clip, cispo, gspo, soft_gate or .*, got 'cspo'"),
        (Named("cispo", {"hihg": 1}), "Expected arguments among low, high for the surrogate 'cispo', got 'hihg'"),
        (Named("gspo", {"low": -1.0}), "Expected `low` and `high` of 0 or more, got -1.0"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(named, message):
    with pytest.raises((CommandError, ValueError), match=message):
        make_surrogate(named, Trust())


def test_an_unknown_aggregation_is_refused_with_the_list():
    with pytest.raises(CommandError, match=r"algorithm.aggregation to be .*token.*sequence.*constant.*, got 'sequnce'"):
        train_config(["--algorithm.aggregation=sequnce"])


def test_a_run_trains_with_both_and_its_rows_name_them(model, tmp_path):
    words = {"algorithm.surrogate": "{id: gspo, args: {low: 0.01}}", "algorithm.aggregation": "constant"}
    assert run("train", *settings(model, tmp_path / "run", 1, **words), "--quiet") == 0
    before, row = rows(tmp_path / "run")
    assert (before["tokens"], row["tokens"]) == (0, ROLLOUT)
    assert before["train/aggregation"] == row["train/aggregation"] == "constant" and row["train/clip_fraction"] == 0
    assert 0 <= row["train/surrogate_clip_fraction"] <= 1, "the update that no rollout follows is logged as well"
    metrics = RunFolder(tmp_path / "run").metrics
    assert read_rows(metrics)[1]["train/aggregation"] == "constant"
    metrics.write_text(metrics.read_text().replace('"constant"', "7"))
    with pytest.raises(CommandError, match=r"Expected a text or nothing as `train/aggregation` in line 1 .*, got 7"):
        read_rows(metrics)
