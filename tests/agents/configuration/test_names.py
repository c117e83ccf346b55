"""The names in a configuration: parts by id or module:Class, with arguments, and the refusal of wrong ones."""

import json
import re

import pytest

from agents.configuration.names import find
from agents.errors import CommandError, Exit
from tests.helpers.command import rows, run, settings
from textenv.checks.trust import Trust
from textenv.rewards.registry import REWARD

OWN = """
from stable_baselines3.common.logger import KVWriter
from textenv.metrics import mean_of
class Words:
    def __init__(self, word): self.word = word
    def __call__(self, prompt, preds, done): return float(self.word in preds.text) if done else 0.0
class Share:
    def __init__(self, word): self.word = word
    def __call__(self, prompts, texts, references): return {self.word: mean_of([self.word in text for text in texts])}
class Steps(KVWriter):
    def __init__(self, file): self.file = file
    def write(self, key_values, key_excluded, step=0):
        if "reward/own" in key_values: open(self.file, "a").write(f"{step} {key_values['reward/own']}\\n")
    def close(self): open(self.file, "a").write("closed\\n")
"""
OWN_CONFIG = """
env:
  reward:
    id: sum
    args:
      parts: {own: {id: "own_parts:Words", args: {word: great}}, form: {id: regex, args: {pattern: "g+", whole: false}}}
      weights: {form: 0.5}
evaluation:
  metrics: [{id: distinct, args: {orders: [3]}}, {id: "own_parts:Share", args: {word: great}}, words]
loggers: [{id: curves}, {id: "own_parts:Steps", args: {file: steps.txt}}]
"""


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """A folder with a user's own classes, and a configuration that names them and built-in ones by id and args."""
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "own.yml").write_text(OWN_CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_reward_a_metric_and_a_logger_by_id_and_args_or_by_module_and_class(own_parts, model):
    words = settings(model, own_parts / "run", rollouts=2)
    words.remove("--loggers=[]")
    assert run("train", "own.yml", *words, "--allow", "own_parts", "--quiet") == 0
    lines = rows(own_parts / "run")
    parts = {row["tokens"]: (row["reward/own"], row["reward/form"], row["reward/task"]) for row in lines[1:]}
    assert all(own + form == pytest.approx(task) for own, form, task in parts.values())
    assert any(form > 0 for _, form, _ in parts.values())
    figures = json.loads((own_parts / "run" / "results.json").read_text())["after"]["figures"]
    assert {"distinct_3", "great", "length_words", "reward/own"} <= figures.keys() and "distinct_1" not in figures
    assert figures["great"] == figures["reward/own"]
    *written, last = (own_parts / "steps.txt").read_text().splitlines()
    assert written == [f"{tokens} {own}" for tokens, (own, _, _) in parts.items()] and last == "closed"
    assert (own_parts / "run" / "curves.png").is_file() and not (own_parts / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--loggers=[{id: tensorboard, args: {folder: x}}]"],
            "no arguments of the logger 'tensorboard', got",
        ),
        (["--loggers=['own_parts:Nothing']"], "Expected 'own_parts:Nothing' to be there"),
        (["--loggers=['own_parts:Steps']"], "Expected the argument 'file' for the logger 'own_parts:Steps', got none"),
        (
            ["--loggers=[{id: 'own_parts:Words', args: {word: a}}]"],
            "Expected a KVWriter of Stable-Baselines3 at 'own",
        ),
        (
            ["--evaluation.metrics=['own_parts:Share']"],
            "Expected the argument 'word' for the metric 'own_parts:Share', got none",
        ),
        (["--evaluation.metrics=[rogue]"], "Expected a metric among rouge, .* or module:Class, got 'rogue'"),
        (
            ["--env.reward={id: 'own_parts:Words', args: {w: a}}"],
            "Expected arguments among word for the reward 'own_parts:Words', got 'w'",
        ),
        (["--env.reward=keywords"], "'module:name' or one of .*, got 'keywords'"),
    ],
)
def test_parts_that_cannot_be_built_are_refused(words, message, own_parts, model, capfd):
    assert run("train", *settings(model, own_parts / "run"), *words, "--allow", "own_parts", "--quiet") == 2
    assert re.search(message, capfd.readouterr().err)


def test_a_missing_package_of_the_users_own_class_is_no_misspelt_name(tmp_path, monkeypatch):
    (tmp_path / "own_needs.py").write_text("import not_there_at_all\n\nclass Reward: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path, code in [("own_needs:Reward", Exit.MISSING), ("own_need:Reward", Exit.REFUSED)]:
        with pytest.raises(CommandError, match=r"Expected .*own_need.*got: No module named") as caught:
            find(path, REWARD, Trust(("own_needs", "own_need")))
        assert caught.value.code == code
