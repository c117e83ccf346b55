"""Defaults of the command: lengths fit run and model, help lists them, and what Ctrl-C leaves behind."""

import io
import json
import re
import signal
import warnings
from functools import partial

import pytest

from agents.checkpoints.manifest import newest_intact
from agents.cli import main as cli
from agents.configuration.defaults import DEMO_PPO_SETTINGS, DEMO_SETTINGS
from agents.errors import Exit
from agents.evaluation.evaluation import evaluate
from agents.evaluation.generation import generate
from agents.runs.folder import RunFolder
from agents.signals import Interrupts, leave
from agents.supervised.sft import tune
from tests.agents.report.made_runs import data_of
from tests.helpers.command import ROOT, rows, run, settings
from tests.helpers.training import TOKENIZER, tiny_agent, tiny_config, tiny_env

EXIT_CODES = (ROOT / "docs/reference/exit_codes.md").read_text(encoding="utf-8")
LONG = "this phone is great and " * 5  # 25 tokens of the 32 that the small model reads


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished run of texts of at most 8 tokens, which also end at "." or "great"."""
    out = tmp_path_factory.mktemp("runs") / "done"
    more = {"env.args": "{stop_strings: ['.', great]}", "env.masks": "[{id: banned, args: {texts: [lovely]}}]"}
    assert run("train", *settings(model, out, 1, **more, **{"algorithm.name": "maskable_ppo"}), "--quiet") == 0
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("this phone is\nthe lamp was\n")
    (tmp_path / "long.txt").write_text(f"this phone is\n{LONG}\n")
    (tmp_path / "longer.txt").write_text(f"{LONG}{LONG}\n")
    return tmp_path


def said(capsys):
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


# Lengths of generate, chat and rate


def test_generate_takes_prompts_lengths_ends_and_masks_from_the_run(done, here, capsys):
    assert run("generate", done, "--n", "8") == 0
    texts, err = said(capsys)
    assert err == "" and len(texts) == 8 * 40 and texts[0]["prompt"] == "this phone is"
    assert {text["end_reason"] for text in texts} == {"stop", "eos", "length"}
    assert max(len(text["text"].split()) for text in texts) == 8
    assert not any(word in text["text"].split() for text in texts for word in ("great", "lovely", "."))
    assert run("generate", done, "--prompts", "p.txt", "--max_new_tokens", "12", "--n", "16") == 0
    assert 8 < max(len(text["text"].split()) for text in said(capsys)[0]) <= 12


def test_the_page_of_an_episode_counts_the_tokens_that_masks_allow(done):
    assert run("show", done, "--html") == 0
    row = data_of(done / "episode.html")["runs"][0]["episodes"]["tables"][0]["episodes"][0]
    n_tokens = json.loads((done / "vocabulary.json").read_text())["size"]
    assert all(0 < count < n_tokens for count in row["support"]) and len(row["kl"]) == len(row["pieces"])


def test_generate_says_when_the_model_has_less_room(model, here, capsys):
    assert run("generate", model, "--prompts", "p.txt") == 0
    texts, err = said(capsys)
    assert err == "textenv: Texts have at most 29 tokens, not 64: behind prompts of up to 3 the model reads no more.\n"
    assert len(texts) == 2
    assert run("generate", model, "--prompts", "long.txt") == 0
    assert "at most 7 tokens, not 64: behind prompts of up to 25 " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prompts", "long.txt", "--max_new_tokens", "8"],
            "Expected --max_new_tokens 7 or less behind prompts of up",
        ),
        (["--prompts", "longer.txt"], "Expected prompts that leave the model room for a text, got one of 50 tokens"),
        ([], "Expected --prompts FILE for textenv generate .*, got none"),
    ],
)
def test_what_generate_refuses_it_says_by_its_own_options(words, message, model, here, capsys):
    assert run("generate", model, *words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_chat_leaves_room_for_what_was_said(model, done, here, capsys, monkeypatch):
    for source, word in ((model, "at most 16 tokens, not 64: the model reads 32 in all"), (done, "")):
        monkeypatch.setattr("sys.stdin", io.StringIO("this phone is\n" * 4))
        assert run("chat", source) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 4 and (word in err if word else err == "")
    assert run("chat", model, "--max_new_tokens", "32") == 2
    assert "Expected --max_new_tokens below 32, which is all that the model can read" in capsys.readouterr().err


def test_rate_takes_the_length_of_the_run_or_what_there_is_room_for(model, done, here, capsys, monkeypatch):
    from textenv.feedback.store import FeedbackStore

    for source, most, word in ((done, 8, ""), (model, 29, "at most 29 tokens, not 32")):
        monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
        assert run("rate", source, "--prompts", "p.txt", "--n", "8", "--db", f"{most}.db") == 0
        assert word in capsys.readouterr().err
        with FeedbackStore(f"{most}.db") as store:
            assert store.progress("nobody", None).left == 16


@pytest.mark.slow
def test_rate_train_has_as_much_room_as_the_model(model, here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("3\n"))
    words = ["--prompts", "p.txt", "--train", "--out", "hand", "--updates", "1"]
    assert run("rate", model, *words) == 0
    assert "at most 29 tokens, not 32" in capsys.readouterr().err


def test_bare_rate_makes_no_database(here, capsys):
    for words in ([], ["--web"], ["--kind", "rank"]):
        assert run("rate", *words) == 2
        assert "Expected a model to write what is rated, as textenv rate demo, or --db FILE" in capsys.readouterr().err
    assert not list(here.glob("*.db"))


# Lengths of the same functions in Python


def test_generate_and_evaluate_write_as_much_as_in_training():
    agent = tiny_agent(tiny_env(max_new_tokens=6, stop_ids=()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = generate(agent, ["a"], TOKENIZER, stop_ids=())
        figures = evaluate(agent, ["a"], TOKENIZER, stop_ids=())
    assert len(texts[0].ids) == 6 and len(figures.generations[0].ids) == 6


def test_they_are_capped_with_a_warning_and_what_is_asked_for_is_not():
    policy = tiny_agent(lm=tiny_config()).policy  # 32 positions
    with pytest.warns(
        UserWarning, match="at most 29 tokens, not 64: behind prompts of up to 3 .*; max_new_tokens chooses"
    ):
        texts = generate(policy, ["abc", "a"], TOKENIZER, stop_ids=())
    assert [len(text.ids) for text in texts] == [29, 29]
    with pytest.warns(UserWarning, match="at most 29 tokens"):
        assert len(evaluate(policy, ["abc"], TOKENIZER, stop_ids=()).generations[0].ids) == 29
    with pytest.raises(
        ValueError, match="32 positions, got up to 33 tokens: lower max_prompt_tokens or max_new_tokens"
    ):
        generate(policy, ["abc"], TOKENIZER, max_new_tokens=30)
    with pytest.raises(ValueError, match=r"leave the model room for a text, got one of 32 tokens .*: .* max_prompt"):
        generate(policy, ["a" * 32], TOKENIZER)
    cut = {"max_prompt_tokens": 30, "truncation_side": "left"}
    with pytest.warns(UserWarning, match="at most 2 tokens"):
        assert len(generate(policy, ["a" * 32], TOKENIZER, stop_ids=(), **cut)[0].ids) == 2


def test_a_stage_names_its_own_option(tmp_path):
    with pytest.raises(ValueError, match="the model's 32 positions, got up to 40 tokens: lower max_tokens"):
        tune(tiny_config(vocab_size=300), ["ab"], tmp_path / "out", max_tokens=40)


# Defaults in help and errors, and prompts of one's own with the default model


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_help_shows_both_defaults_and_words(verb, capsys):
    with pytest.raises(SystemExit):
        run(verb, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: textenv {verb} ") and "<class" not in text and "Show the help for" not in text
    for key, value in (DEMO_SETTINGS | DEMO_PPO_SETTINGS).items():
        entry = text.partition(f"--{key} ")[2].partition(" --")[0]
        assert f'default: {value} with the model "demo"' in entry and re.search("else (null|100000|constant|{})", entry)
    for heading in ("choose the task and its reward:", "--kl {KEY: VALUE, ...}", "(only on the command line):"):
        assert heading in text
    assert (verb == "doctor") == ("Check model and settings before training, or a run after it" in text)


@pytest.mark.slow
def test_prompts_of_ones_own_train_with_the_default_model(here, capsys):
    words = ["--env.id", "text", "--env.reward", "{id: length, args: {target: 5}}", "--algorithm.n_envs", "8"]
    assert run("train", *words, "--env.prompts", "p.txt", "--dry-run", "--evaluation.n_prompts", "2") == 0
    capsys.readouterr()
    (here / "long.txt").write_text(LONG * 2)
    assert run("train", *words, "--env.prompts", "long.txt", "--dry-run") == 2
    error = capsys.readouterr().err
    assert (
        "64 positions, got up to 82 tokens, 50 of the longest prompt and 32 behind it: lower --env.max_new_tokens, 32"
        in error
    )
    assert "--env.args '{max_prompt_tokens: N, truncation_side: left}'" in error
    more = ["--env.prompts", "p.txt", "--evaluation.prompts", "long.txt", "--dry-run"]
    assert run("train", *words, *more) == 2
    assert "--evaluation.env_args '{max_prompt_tokens: N, truncation_side: left}'" in capsys.readouterr().err
    cut = [
        "--env.max_new_tokens",
        "20",
        "--evaluation.env_args",
        "{max_prompt_tokens: 40, truncation_side: left}",
        "--evaluation.n_prompts",
        "2",
    ]
    assert run("train", *words, *more, *cut) == 0, capsys.readouterr().err


def test_every_exit_code_is_in_help_and_on_its_page(capsys):
    assert run() == 0
    for text in (capsys.readouterr().out, EXIT_CODES):
        listed = text.partition("Exit codes:")[2]
        # A signal's exit code is 128 + its number: 2 is SIGINT, 15 is SIGTERM.
        for code in (*(member for member in Exit if member != Exit.SIGNAL), Exit.SIGNAL + 2, Exit.SIGNAL + 15):
            assert re.search(rf"\b{int(code)}\b", listed), code


def test_known_ids_are_listed_once(capsys):
    assert run("train", "--env.id", "nope", "--dry-run") == 2
    names = re.search("to be (.*) or module:Class", capsys.readouterr().err)[1].split(", ")
    assert len({name.lower() for name in names}) == len(names) > 5


# Ctrl-C before anything is saved


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing_in_the_way(model, tmp_path, capsys, monkeypatch):
    from agents.runs import train as training_run

    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    words = [*settings(model, tmp_path / "run", 1), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "assemble", pressed)
        assert run("train", *words) == 130
    error = capsys.readouterr().err
    assert (
        error == f"textenv: interrupted; nothing was saved yet in {tmp_path / 'run'}: the same command starts again\n"
    )
    assert not (tmp_path / "run").exists()
    assert run("train", *words) == 0
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "write_model", pressed)  # training is over and saved
        assert run("train", "--resume", tmp_path / "run") == 130
    assert f"interrupted; continue with: textenv train --resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_a_run_that_was_killed_before_it_saved_anything_can_be_begun_again(model, tmp_path, capsys):
    words = [*settings(model, tmp_path / "run", 1), "--quiet"]
    left = RunFolder.create(str(tmp_path / "run"), "x")
    left.begin("seed: 7\n", "0")
    (left.path / "vocabulary.json").write_text('{"size": 1, "sha256": "x"}')
    (left.path / "best").mkdir()
    left.metrics.write_text('{"tokens": 0}\n')
    with left.locked():
        assert run("train", *words) == 2, "it is still running"
    assert "is in use by pid" in capsys.readouterr().err and left.metrics.is_file()
    assert run("train", *words) == 0
    assert [row["tokens"] for row in rows(left.path)] == [0, 64] and newest_intact(left.checkpoints)[0]
    assert run("train", *words) == 2
    assert "continue with --resume" in capsys.readouterr().err


def test_a_second_signal_says_how_to_go_on(monkeypatch):
    lines, codes = [], []
    monkeypatch.setattr("agents.signals.write_line", lines.append)
    monkeypatch.setattr("os._exit", codes.append)
    again = partial(leave, how_to_go_on=lambda: "nothing was saved yet in run: the same command starts again")
    with Interrupts(lines.append, again=again):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert codes == [130] and lines[1].endswith(
        "stopped at once; nothing was saved yet in run: the same command starts again"
    )


@pytest.mark.parametrize(("verb", "words"), [("train", "nothing was saved yet"), ("sft", "--resume"), ("tasks", None)])
def test_ctrl_c_elsewhere(verb, words, capsys, monkeypatch):
    def pressed(name, words):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, verb, cli.VERBS[verb]._replace(read=pressed))
    assert run(verb) == 130
    error = capsys.readouterr().err
    assert error == "textenv: interrupted\n" if words is None else words in error
