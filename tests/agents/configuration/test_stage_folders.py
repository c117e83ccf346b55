"""A configuration before its stages: the missing folder, and the command that makes it."""

import pytest

from agents.configuration.stage_folders import made_by
from tests.helpers.command import ROOT, refused

CONFIG_FOLDER = ROOT / "examples" / "configs"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "name", "folder", "maker"),
    [
        ("train", "reviews", "runs/reviews/tuned", "textenv sft examples/configs/reviews_sft.yml --data FOLDER"),
        ("train", "hh", "runs/hh/tuned", "textenv sft examples/configs/hh_sft.yml"),
        ("train", "dates", "runs/dates/base", "textenv sft examples/configs/dates_sft.yml --out runs/dates/base"),
        ("train", "smollm2/dailydialog", "runs/dialogues/tuned", "textenv sft examples/configs/smollm2/dailydialog_"),
        ("doctor", "zh_reviews", "runs/zh_reviews/tuned", "textenv sft examples/configs/zh_reviews_sft.yml"),
        ("classifier", "reviews_classifier", "runs/reviews/tuned", "textenv sft examples/configs/reviews_sft.yml"),
        ("reward-model", "hh_reward_model", "runs/hh/tuned", "textenv sft examples/configs/hh_sft.yml"),
    ],
)
def test_a_configuration_before_its_stages_says_which_is_first(verb, name, folder, maker, capfd):
    words = [] if verb in ("train", "doctor") else ["--data=data", "--out=out"]
    error = refused(capfd, verb, CONFIG_FOLDER / f"{name}.yml", *words)
    assert f"Expected the folder {folder}, got none: first run {maker}" in error


def test_the_next_stage_is_named_once_the_first_is_there(here, capfd):
    (here / "runs" / "reviews" / "tuned").mkdir(parents=True)
    error = refused(capfd, "train", CONFIG_FOLDER / "reviews.yml")
    assert "Expected the folder runs/reviews/classifier, got none: first run textenv classifier" in error


def test_commands_are_read_from_opening_comments_alone():
    assert made_by("# no command\ntotal_tokens: 3\n#   textenv sft --out runs/x\n") == {}
