"""`textenv export RUN DIR --to_hub REPO`: the uploaded files, and the message where the upload fails."""

import json

import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.checkpoints import hf_export as exporting
from agents.configuration.config import TrainConfig
from agents.runs.model_card import model_card
from tests.helpers.command import ROLLOUT, rows, run, settings, small_model


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs")
    words = settings(small_model(folder / "small"), folder / "done", rollouts=2, license="mit")
    assert run("train", *words, "--quiet") == 0
    return folder / "done"


class FakeHub:
    """The two methods of huggingface_hub.HfApi that are called; keeps the files of an uploaded folder."""

    def __init__(self, error=None):
        self.error, self.made, self.files = error, [], {}

    def __call__(self):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.made.append((repo_id, private, exist_ok))

        class Url(str):
            pass

        url = Url(f"https://hub/{repo_id}")
        url.repo_id = repo_id
        return url

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert repo_id == self.made[-1][0] and commit_message
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}


def test_the_folder_goes_to_the_hub_with_card_curves_and_samples(done, tmp_path, monkeypatch, capsys):
    hub = FakeHub()
    monkeypatch.setattr(exporting, "HfApi", hub)
    assert run("export", done, tmp_path / "model", "--to_hub", "me/reviews") == 0
    assert hub.made == [("me/reviews", True, True)]
    assert "https://hub/me/reviews: a new repository is private" in capsys.readouterr().out
    assert hub.files.keys() >= {"README.md", "curves.png", "samples.jsonl", "model.safetensors", "config.json"}
    assert not [name for name in hub.files if name.endswith((".zip", ".pkl", ".pt", ".bin"))], "nothing that unpickles"
    assert hub.files["curves.png"].startswith(b"\x89PNG")
    assert [json.loads(line) for line in hub.files["samples.jsonl"].splitlines()] == rows(done, "samples.jsonl")
    card = hub.files["README.md"].decode()
    _, fields, body = card.split("---\n", 2)
    listed = yaml.safe_load(fields)
    figure = json.loads((done / "results.json").read_text())["after"]["figures"]["reward"]
    [result] = listed["model-index"][0]["results"]
    assert listed["license"] == "mit" and result["dataset"]["name"] == "demo"
    assert result["metrics"] == [{"type": "mean_reward", "name": "mean_reward", "value": round(figure, 4)}]
    assert "![Reward, divergence and length over training](curves.png)" in body
    table = body.split("## Samples\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0] == f"| prompt | after 0 tokens | after {2 * ROLLOUT} tokens | reward |"
    assert len(table) == 2 + 4 and "this phone is" in table[2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "model")


def test_without_the_flag_nothing_is_sent(done, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "HfApi", lambda: pytest.fail("asked for the hub"))
    assert run("export", done, tmp_path / "model") == 0
    assert (tmp_path / "model" / "samples.jsonl").is_file() and (tmp_path / "model" / "curves.png").is_file()


@pytest.mark.parametrize("error", [LocalTokenNotFoundError("no\ntoken"), ConnectionError("no network")])
def test_what_the_hub_does_not_take_stays_whole_and_the_cure_is_said(error, done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "HfApi", FakeHub(error))
    assert run("export", done, tmp_path / "model", "--to_hub=me/reviews") == 5
    said = capsys.readouterr().err
    assert f"hf upload me/reviews {tmp_path / 'model'}" in said and "hf auth login" in said and said.count("\n") == 1
    assert (tmp_path / "model" / "README.md").is_file()


def test_a_name_that_is_none_is_refused_before_the_work(done, tmp_path, capsys):
    assert run("export", done, tmp_path / "model", "--to_hub", "me//reviews") == 2
    assert "Expected the name of a repository, as you/model, got 'me//reviews'" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_configuration_cannot_send_anything(done, tmp_path, monkeypatch):
    """The flag exists on the command line only."""
    monkeypatch.setattr(exporting, "HfApi", lambda: pytest.fail("asked for the hub"))
    config = tmp_path / "config.yml"
    config.write_text((done / "config.yml").read_text() + "to_hub: me/reviews\n")
    assert run("train", config, "--total_tokens", "64", "--out", tmp_path / "run") == 2


def test_samples_in_the_card_are_text():
    hostile = "<script>|a|\n[x](http://y) ```\x1b[31m"
    sample = {"prompt": hostile, "text": hostile, "reward": 0.5}
    about = {"versions": {}, "git": {"textenv": None}}
    card = model_card(TrainConfig(), about, "| figure |", [{"tokens": 0, **sample}, {"tokens": 64, **sample}])
    shown = card.split("## Samples\n\n")[1].split("\n\n")[0]
    assert "<script>" not in shown and "](" not in shown and "`" not in shown and "\x1b" not in shown
    assert [line.count("|") for line in shown.splitlines()] == [5, 5, 5]
    assert model_card(TrainConfig(), about, "", reward_after=float("nan")).count("model-index") == 0
