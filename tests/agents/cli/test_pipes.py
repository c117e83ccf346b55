"""What the verbs print where nobody watches: lines in pipes and log files, and no bar that is drawn over itself."""

import io
import json

import pytest
from transformers.utils import logging

from agents.small_models import demo_model as demo_models
from agents.small_models import progress
from tests.helpers.command import run, settings, small_model
from textenv import demo

BAR = ("\r", "%|", "it/s", "step/s", "text/s")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, a finished run, and data for every stage."""
    folder = tmp_path_factory.mktemp("pipes")
    small_model(folder / "small")
    things = ("lamp", "phone", "blue lamp", "old black phone")
    pairs = [{"prompt": f"the {thing} was ", "chosen": "great .", "rejected": "awful ."} for thing in things] * 12
    labelled = [{"text": f"the {thing} was {word} .", "label": word} for thing in things for word in ("good", "bad")]
    (folder / "texts.txt").write_text("\n".join(demo.reviews(16)))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    assert run("train", *settings(folder / "small", folder / "run", 1), "--quiet") == 0
    return folder


STAGE = ["--model", "small", "--batch_size", 4, "--out"]
PAIRS = ["--data", "pairs.jsonl"]
TEXTS = ["small", "--prompts", "texts.txt", "--max_new_tokens", 4]
SPOKEN = {  # the words of a verb, and what its progress says in a pipe; None for a verb that counts nothing
    "sft": (["sft", *STAGE, "tuned", "--data", "texts.txt", "--held_out", "texts.txt"], "training: 4 of 4 steps in "),
    "classifier": (["classifier", *STAGE, "read", "--data", "labelled.jsonl"], "training: 6 of 6 steps in "),
    "reward-model": (["reward-model", *STAGE, "scored", *PAIRS], "reward model: 12 of 12 steps in "),
    "head": (["reward-model", *STAGE, "head", *PAIRS, "--train", "head"], "states of the reward model: 96 of 96 texts"),
    "critic": (["critic", *settings("small", "fitted", 1), "--rollouts", 2], "rollouts: 2 of 2 rollouts in "),
    "generate": (["generate", *TEXTS], "prompts: 1 of 1 chunks in "),
    "rate": (["rate", *TEXTS, "--web"], "completions: 1 of 1 chunks in "),
    "evaluate": (["evaluate", "run"], None),
    "train": (["train", *settings("small", "trained", 1)], None),
    "dry run": (["train", *settings("small", rollouts=1), "--dry-run"], None),
    "show": (["show", "run"], None),
    "report": (["report", "run"], None),
    "export": (["export", "run", "exported"], None),
    "doctor": (["doctor", "run"], None),
    "chat": (["chat", "run"], None),
}


@pytest.mark.parametrize("name", SPOKEN)
def test_a_pipe_has_lines_and_no_bar(name, home, monkeypatch, capfd):
    """Here each state has its line, not one in half a minute."""
    words, line = SPOKEN[name]
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.setattr("textenv.feedback.web.serve", lambda store, **kwargs: None)  # which waits for people
    monkeypatch.setattr(progress, "SECONDS_OF_A_LINE", 0.0)
    logging.enable_progress_bar()  # which an earlier verb in this process has switched off
    assert run(*words) == 0
    out, err = capfd.readouterr()
    assert [text for text in BAR if text in out + err] == []
    assert line is None or line in err, err


def test_the_making_of_the_demo_model_has_lines(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(progress, "SECONDS_OF_A_LINE", 0.0)
    demo_models.demo_model(tmp_path / "cache", n_epochs=0.01)
    err = capfd.readouterr().err
    assert "demo" in err and " steps in " in err and "\r" not in err
