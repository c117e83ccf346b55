"""`textenv rate`: completions of a model become questions, each asked once, and a loop trains on the answers."""

import io
import json
import re
import signal
import sys
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents.cli import rate as rate_module
from agents.cli.options import RateConfig, RateOptions
from agents.cli.rate import ask, fingerprint
from agents.cli.trained_model import open_writer
from tests.helpers.command import environment, run, settings
from tests.helpers.people import Crowd, Rater
from textenv.feedback.asked import questions_of
from textenv.feedback.store import FeedbackStore

PROMPTS = ["this phone is", "the lamp was", "my new radio is", "this phone is"]


@pytest.fixture
def pexpect():
    """The library that runs a process in a terminal; skips the test where it is not installed."""
    return pytest.importorskip("pexpect")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path


def rate(model, lines, *words, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    usual = ["--prompts", "prompts.txt", "--rater", "ann", "--max_new_tokens", "4"]
    return run("rate", model, *usual, *words)


def answers(path="ratings.db"):
    with FeedbackStore(path) as store:
        return store.answers()


def test_an_interrupted_session_goes_on(model, here, monkeypatch, capsys):
    assert rate(model, ["3", "x", "4", "q"], monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "4 new questions in ratings.db" in said and "Expected a score from 1 to 5, got 'x'" in said
    assert "ann: 2 answered, 0 skipped, 2 left" in said and "textenv reward-model --from-feedback ratings.db" in said
    assert rate(model, ["5", "s"], "--terminal", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "0 new questions" in said and "ann: 3 answered, 1 skipped, 0 left" in said
    given = answers()
    assert [answer.value for answer in given] == [(3.0,), (4.0,), (5.0,), None]
    assert sorted(answer.prompt for answer in given) == sorted(PROMPTS)
    assert {answer.models for answer in given} == {(str(model),)}
    assert all(answer.completions[0] for answer in given)


def test_other_settings_or_weights_are_other_questions(model, here):
    writer = open_writer(str(model), None, RateOptions())

    def n_new(**settings):
        config = RateConfig(**{"model": str(model), "db": str(here / "all.db"), "max_new_tokens": 4, **settings})
        with FeedbackStore(config.db) as store:
            return ask(store, writer, PROMPTS, config)

    assert [n_new(), n_new()] == [4, 0]
    assert [n_new(kind="compare"), n_new(kind="compare"), n_new(kind="compare", n=4)] == [4, 0, 8]
    assert [n_new(kind="rank"), n_new(kind="rank", n=3), n_new(n=2), n_new(seed=1)] == [4, 4, 8, 4]
    before = fingerprint(writer.policy)
    with torch.no_grad():
        next(writer.policy.backbone.model.parameters()).add_(1e-3)
    assert fingerprint(writer.policy) != before and n_new() == 4


def test_broken_off_while_it_writes_nothing_is_written_twice(model, here, monkeypatch):
    monkeypatch.setattr(rate_module, "CHUNK", 1)
    writer = open_writer(str(model), None, RateOptions())
    config = RateConfig(model=str(model), db=str(here / "all.db"), max_new_tokens=4, n=2)
    with FeedbackStore(config.db) as store:
        add, n_added = store.add, []

        def broken(*args, **kwargs):
            if len(n_added) == 3:
                raise KeyboardInterrupt
            n_added.append(add(*args, **kwargs))

        monkeypatch.setattr(store, "add", broken)
        with pytest.raises(KeyboardInterrupt):
            ask(store, writer, PROMPTS, config)
    with FeedbackStore(config.db) as store:
        assert ask(store, writer, PROMPTS, config) == 8 - 3
        run_name = f"{model} {fingerprint(writer.policy, 'score', 2, (1.0, 5.0), 4, 0)}"
        prompts = [question.prompt for question in questions_of(config.db, run_name)]
    assert sorted(prompts) == sorted(PROMPTS * 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{model}", "--prompts", "prompts.txt", "--web", "--terminal"], "one of --web and --terminal"),
        (["{model}", "--prompts", "prompts.txt", "--web", "--train"], "one of --web and --train"),
        (["{model}"], "Expected --prompts FILE"),
        (["{model}", "--prompts", "nowhere.txt"], "Expected prompts in nowhere.txt"),
        (
            ["{model}", "--prompts", "prompts.txt", "--kind", "compare", "--n", "3"],
            "a positive even --n to compare, got 3",
        ),
        (["{model}", "--prompts", "prompts.txt", "--kind", "rank", "--n", "9"], "--n from 2 to 8 to rank, got 9"),
        (["{model}", "--prompts", "prompts.txt", "--n", "0"], "Expected n to be 1 or more, got 0"),
        (["{model}", "--prompts", "prompts.txt", "--train"], "--out DIR"),
        (["{model}", "--prompts", "prompts.txt", "--train", "--out", "o", "--kind", "rank"], "no other --kind"),
        (["--train", "--out", "o"], "Expected a model"),
        (["--rater", " "], "Expected a rater's name"),
        (["{model}", "--prompts", "prompts.txt", "--low", "5"], "lowest and the highest score"),
        (["--db", "nowhere/ratings.db"], "Expected a store of feedback to write to, got nowhere/ratings.db"),
        (["--db", "prompts.txt"], "Expected a store of feedback"),
    ],
)
def test_refusals(words, said, model, here, capsys):
    code = run("rate", *(word.format(model=model) for word in words))
    error = capsys.readouterr().err
    assert code == (5 if "to write to" in said else 2) and said in error and error.count("\n") == 1


def test_every_sample_of_the_loop_is_of_the_model_of_then(model, here, monkeypatch, capsys):
    words = ["--train", "--out", "hand", "--learning_rate", "0.01", "--updates", "3"]
    assert rate(model, ["5", "1", "s", "4", "2"], *words, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert re.findall(r"update (\d): mean of the last \d scores (\S+)", said) == [
        ("1", "5.00"),
        ("2", "3.00"),
    ]  # the third was skipped
    assert "model: hand/model   answers: hand/ratings.db" in said
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, "hand/model"))
    assert not torch.equal(before.transformer.wte.weight, after.transformer.wte.weight)
    assert rate(model, [], *words[:-4], "--learning_rate", "0.1", monkeypatch=monkeypatch) == 2
    assert "learning_rate 0.01 then" in capsys.readouterr().err


def test_ctrl_c_in_the_loop_ends_with_130_and_quitting_with_0_and_both_write_the_model(
    model, here, monkeypatch, capsys
):
    """Ctrl-C while a line is awaited: earlier scores are trained on, and the same command does not ask them again."""
    words = ["--train", "--out", "hand", "--learning_rate", "0.01", "--updates", "2"]
    with monkeypatch.context() as patch:
        lines = iter(["5"])
        patch.setattr(
            "rich.console.input", lambda: next(lines, None) or signal.raise_signal(signal.SIGINT), raising=False
        )
        assert rate(model, [], *words, monkeypatch=patch) == 130
    said = capsys.readouterr()
    assert "update 1: mean of the last 1 scores 5.00" in said.out and "model: hand/model" in said.out
    assert said.err.endswith("textenv: interrupted, and the model is written: the same command continues.\n")
    assert (here / "hand" / "model" / "config.json").is_file() and len(answers("hand/ratings.db")) == 1
    assert rate(model, ["q"], *words, monkeypatch=monkeypatch) == 0
    assert "update 1: mean of the last 1 scores 5.00" in capsys.readouterr().out
    assert rate(model, ["4"], *words, monkeypatch=monkeypatch) == 0
    assert len(answers("hand/ratings.db")) == 2


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_the_loop_goes_on_where_it_was_killed_and_asks_nothing_twice(model, here, monkeypatch, capsys):
    monkeypatch.setattr("agents.cli.rate_training.SAVE_EVERY", 2)
    lines = [str(1 + number % 5) for number in range(7)]
    words = ["--train", "--learning_rate", "0.01", "--updates", "7"]
    assert rate(model, lines, *words, "--out", "whole", "--db", "whole.db", monkeypatch=monkeypatch) == 0
    # Stop after three answers; the newest checkpoint is after two updates. Then give the remaining answers.
    assert rate(model, [*lines[:3], "q"], *words, "--out", "parts", "--db", "parts.db", monkeypatch=monkeypatch) == 0
    assert len(answers("parts.db")) == 3
    assert rate(model, lines[3:], *words, "--out", "parts", "--db", "parts.db", monkeypatch=monkeypatch) == 0
    assert "continues from parts/checkpoints/step_000000000008" in capsys.readouterr().out
    whole, parts = answers("whole.db"), answers("parts.db")
    assert len(whole) == 7
    # The fields of prompts, texts and scores; times and ids differ.
    assert [answer[:2] + answer[4:7] for answer in parts] == [answer[:2] + answer[4:7] for answer in whole]
    first, second = weights("whole/model"), weights("parts/model")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_session_in_a_terminal_that_is_killed(model, here, pexpect, monkeypatch, capsys):
    command = ["-m", "agents.cli", "rate", str(model), "--prompts", "prompts.txt", "--rater", "ann"]
    options = {"env": environment(), "encoding": "utf-8", "timeout": 60, "cwd": str(here)}
    child = pexpect.spawn(sys.executable, [*command, "--max_new_tokens", "4"], **options)
    child.expect("4 new questions"), child.expect("0 answers"), child.sendline("2")
    child.expect("1 answer, mean 2.00"), child.kill(signal.SIGKILL), child.wait()
    assert [answer.value for answer in answers(here / "ratings.db")] == [(2.0,)]
    assert rate(model, ["u", "5", "q"], monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "0 new questions" in said and "1 answer, mean 2.00" in said and "ann: 1 answered, 0 skipped, 3 left" in said
    assert [answer.value for answer in answers()] == [(5.0,)]


@pytest.mark.slow
def test_a_run_is_rated_by_its_newest_model_and_goes_on_by_hand(model, here, monkeypatch, capsys):
    assert run("train", *settings(model, "run", rollouts=1), "--quiet") == 0
    assert rate("run", ["3"] * 4, monkeypatch=monkeypatch) == 0
    assert "4 new questions" in capsys.readouterr().out
    words = ["--train", "--out", "hand", "--updates", "1", "--n", "2"]
    assert rate("run", ["1", "5"], *words, monkeypatch=monkeypatch) == 0
    assert "update 1: mean of the last 2 scores 3.00" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_serves_what_was_asked(model, here, pexpect):
    pytest.importorskip("uvicorn")
    command = ["-m", "agents.cli", "rate", str(model), "--prompts", "prompts.txt", "--web", "--max_new_tokens", "4"]
    options = {"env": environment(), "encoding": "utf-8", "timeout": 60, "cwd": str(here)}
    child = pexpect.spawn(sys.executable, command, **options)
    child.expect("4 new questions"), child.expect(r"until Ctrl-C: (http://127.0.0.1:\d+/)\r")
    with urllib.request.urlopen(child.match[1], timeout=10) as page:
        assert page.status == 200
    child.send("\x03"), child.expect(pexpect.EOF), child.close()
    assert child.exitstatus == 0


def test_a_page_that_others_can_reach_needs_a_token(here, capsys):
    pytest.importorskip("uvicorn")
    assert run("rate", "--db", "ratings.db", "--web", "--host", "0.0.0.0") == 2
    assert "Expected a `token` to listen on 0.0.0.0" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_what_people_say_and_again_without_them(model, here):
    """The reward "human": a thread answers while the run trains; the same run again asks nothing more."""
    reward = {"id": "human", "args": {"db": "ratings.db", "scale": [0, 1]}}
    more = {"env.reward": json.dumps(reward), "samples": 0, "evaluation.n_prompts": 2}
    with FeedbackStore("ratings.db", seed=0) as store:
        with Crowd(Rater(store)) as crowd:
            assert run("train", *settings(model, "run", rollouts=2, **more), "--quiet") == 0
        asked = [(question.prompt, question.completions) for question in questions_of("ratings.db", "training")]
        assert len(asked) == len(set(asked)) == crowd.n_answers == len(store.answers()) > 16
        assert run("train", *settings(model, "again", rollouts=2, **more), "--quiet") == 0
        assert len(questions_of("ratings.db", "training")) == len(asked)
    first, second = weights("run/model"), weights("again/model")
    assert all(torch.equal(first[name], second[name]) for name in first)
