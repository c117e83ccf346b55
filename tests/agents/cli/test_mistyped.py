"""Typing mistakes in commands, configurations and data: exit code 2, and one line with the cause and the cure."""

import json
import re
import shutil
import typing

import pytest

from agents.cli.stages import ENOUGH
from tests.helpers.command import refused, run, settings
from textenv import TASKS, TextEnv
from textenv.checks.signatures import check_arguments, needed
from textenv.rewards import make_reward


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--total_tokens 0", "Expected total_tokens to be 1 or more, got 0."),
        ("--seed 4294967296", "Expected seed to be 0 or more and at most 4,294,967,295, got 4294967296."),
        ("--model.top_p 1.5", "Expected model.top_p to be above 0 and at most 1, got 1.5."),
        ("--algorithm.learning_rate fast", "algorithm.learning_rate to be a number or null, got 'fast'."),
        ("--algorithm.n_envs 1.5", "Expected algorithm.n_envs to be a whole number, got '1.5'."),
        ("--model.train most", "Expected model.train to be one of all, head, last_layers, lora, got 'most'."),
        ("--model.value_norm x", "Expected model.value_norm to be one of norm, popart or null, got 'x'."),
        ("--evaluation.higher_is_better so", "evaluation.higher_is_better to be true or false, got 'so'."),
        ("--algorithm.args 3", "Expected algorithm.args to be keys with values, as {key: value}, got '3'."),
        ("--env.on_failure skip", "Expected env.on_failure to be one of raise, drop or a number, got 'skip'."),
        ("--env.reward {idd:x}", "Expected env.reward to be {id: NAME, args: {...}} or a text or null, got"),
        ("--env.reward.idd x", "Expected env.reward to be {id: NAME, args: {...}} or a text or null, got 'idd: x'"),
        ("--loggers null", "Expected loggers to be a list, as [ONE, ANOTHER], each"),
        ("--trust_remote_code=so", "--trust_remote_code/--trust-remote-code: ignored explicit argument 'so'."),
        ("--trials 3", "--trials 3, since only textenv tune reads it: leave it out."),
        ("--resume", "Expected --resume RUN, the folder of a run, got --resume alone: it is for --seeds."),
        ("--device gpu", "Expected device to be auto, cpu, cuda or another of torch's, got 'gpu'."),
        ("--env.args.max_tokns 3", "for env.args, got 'max_tokns'"),
        ("--env.args.tokenizer x", "Expected no argument 'tokenizer' for env.args, which sets it itself."),
        ("--env.id Dates --env.args.sed 1", "for the task Dates, got 'sed': did you mean 'seed'?"),
        ("--env.id Dates --env.reward length", "no argument 'reward' for the task Dates, which sets it itself."),
        ("--algorithm.args.target_kll 1", "for algorithm.args, got 'target_kll': did you mean 'target_kl'?"),
        ("--algorithm.args.seed 1", "Expected seed in the place of algorithm.args.seed"),
        ("--algorithm.args.n_steps 1", "Expected algorithm.n_steps in the place of algorithm.args.n_steps"),
        ("--algorithm.args.policy x", "for algorithm.args, got 'policy'"),
        ("--algorithm.name trpo --algorithm.n_epochs 3", "Expected no algorithm.n_epochs with trpo, got 3."),
        ("--evaluation.metrics [{id:distinct,args:{order:3}}]", "for the metric 'distinct', got 'order': did you mean"),
        ("--env.masks [{id:allowed,args:{idss:3}}]", "for the mask 'allowed', got 'idss': did you mean 'ids'?"),
    ],
)
def test_words_of_train_that_are_refused(words, said, model, capfd):
    typed = [word.replace(":", ": ") if "{" in word else word for word in words.split()]
    assert said in refused(capfd, "train", f"--model.name={model}", *typed)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_without_its_data_says_what_to_add(task, model, capfd):
    needs = [argument for argument in needed(environment_of(task)) if argument != "tokenizer"]
    if not needs:
        assert task in ("IncreasingNumbers", "Dates")
        return
    flags = {"prompts": "--env.prompts FILE", "data": "--env.args.data FOLDER", "name": "--env.args.name VALUE"}
    flag = flags[needs[0]]
    error = refused(capfd, "train", f"--model.name={model}", f"--env.id={task}")
    assert f"Expected {flag}" in error and f"for the task {task}, got none: add {flag} to the command." in error


def environment_of(task):
    module, _, name = TASKS[task].partition(":")
    return getattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("sft", "--n_epochs 0", "Expected n_epochs to be above 0, got 0.0."),
        ("sft", "--fresh 3", "Expected fresh to be keys with values"),
        ("reward-model", "--loss mean", "Expected loss to be one of last, tokens, got 'mean'."),
        ("classifier", "--max_tokens 0", "Expected max_tokens to be 1 or more, got 0."),
        ("rate", "--port 70000", "Expected port to be 0 or more and at most 65,535, got 70000."),
        ("generate", "x --n 0", "Expected n to be 1 or more, got 0."),
        ("show", "x --prompt -1", "Expected prompt to be 0 or more, got -1."),
        ("evaluate", "x --metrics", "argument --metrics"),
    ],
)
def test_words_of_other_verbs_that_are_refused(verb, words, said, capfd):
    assert said in refused(capfd, verb, *words.split())


# Data


@pytest.mark.parametrize(
    ("verb", "name", "text", "said"),
    [
        (
            "reward-model",
            "a.csv",
            "text,label\na,1\nb,pos\n",
            "a number in the column label of row 2 of a.csv, got 'pos'",
        ),
        ("reward-model", "a.csv", "text,label\na,nan\n", "a number in the column label of row 1 of a.csv, got 'nan'"),
        ("reward-model", "a.jsonl", '{"text": 1, "label": 1}', "a text in the column text of row 1 of a.jsonl, got 1"),
        ("reward-model", "a.jsonl", '{"chosen": "a", "rejected": 3}', "a text in the column rejected of row 1 of"),
        (
            "reward-model",
            "a.csv",
            "chosen,rejected\na,b\nc\n",
            "a text in the column rejected of row 2 of a.csv, got None",
        ),
        ("reward-model", "a.jsonl", '{"chosen": "a"}', "chosen and rejected, or text and label, in row 1 of a.jsonl"),
        ("reward-model", "a.csv", "good,bad\na,b,c\n", "2 cells, as the header has, got more in row 1 of 'a.csv'"),
        ("classifier", "a.jsonl", '{"text": 1, "label": 1}', "a text in the column text of row 1 of a.jsonl, got 1"),
        ("classifier", "a.csv", "text,label\na,x\nb\n", "a label in the column label of row 2 of a.csv, got None"),
        (
            "classifier",
            "a.csv",
            "text,labels\na,x\n",
            "Expected text and label in row 1 of a.csv, got ['labels', 'text']",
        ),
        ("sft", "a.jsonl", '{"text": 3}', "Expected a text in the column text of row 1 of a.jsonl, got 3."),
        ("sft", "a.jsonl", '{"prompt": "a", "reference": ["b"]}', "a text in the column reference of row 1 of a.jsonl"),
        ("sft", "a.jsonl", '{"txt": "a"}', "Expected prompt and reference, or text, in row 1 of a.jsonl, got ['txt']"),
        ("sft", "a.jsonl", '{"text": "a"}\n{', "Expected JSON on line 2 of 'a.jsonl'"),
        ("sft", "a.txt", "\n", "Expected rows in a.txt, got none."),
        ("sft", "a.pdf", "x", "Expected a file that ends in .jsonl, .json, .csv or .txt, got 'a.pdf'"),
        ("sft", None, "", "Expected rows in none.txt, got no such file."),
    ],
)
def test_cells_that_no_stage_can_read(verb, name, text, said, model, here, capfd):
    if name is not None:
        (here / name).write_text(text)
    words = ["--model", model, "--data", name or "none.txt", "--out", "out", "--quiet"]
    assert said in refused(capfd, verb, *words)


@pytest.mark.parametrize("n", [13, ENOUGH])
def test_a_reward_model_says_that_its_examples_are_too_few(n, model, here, capfd):
    rows = [{"chosen": "great .", "rejected": "awful ."}] * n
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("reward-model", "--model", model, "--data", "pairs.jsonl", "--out", "scorer", "--quiet") == 0
    warned = f"warning: {n} examples are too few for a reward model: {ENOUGH} are the least" in capfd.readouterr().err
    assert warned is (n < ENOUGH)
    shutil.rmtree(here / "scorer")


# In Python


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("length", {"targe": 3}, "among target, unit for the reward 'length', got 'targe': did you mean 'target'?"),
        ("regex", {}, "Expected the argument 'pattern' for the reward 'regex', got none."),
        ("sum", {"parts": {"a": {"name": "length", "targe": 3}}}, "for the reward 'length', got 'targe'"),
    ],
)
def test_arguments_of_rewards(name, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make_reward(name, **options)
    assert make_reward("length", target=3).target == 3


class Open(TextEnv):
    def __init__(self, prompts, tokenizer, *, extra, **kwargs):
        super().__init__(prompts, tokenizer, **kwargs)


class Pair(typing.NamedTuple):
    one: int
    other: int = 0


def test_arguments_through_keywords_of_base_classes_and_of_those_without_a_signature():
    assert needed(Open) == ["prompts", "tokenizer", "extra"] and needed(Pair) == ["one"]
    check_arguments(Open, {"prompts", "tokenizer", "extra", "max_new_tokens"}, "it")
    with pytest.raises(ValueError, match="for it, got 'max_new_token': did you mean 'max_new_tokens'"):
        check_arguments(Open, ["prompts", "tokenizer", "extra", "max_new_token"], "it")
    with pytest.raises(ValueError, match=r"Expected no arguments for it, got 'x'\."):
        check_arguments(lambda: None, ["x"], "it")
    check_arguments(dict, ["x"], "it")
    check_arguments(lambda **options: None, ["x"], "it")


def test_a_run_with_one_name_for_each_list(model, here):
    """The control for the refusals: the same words, spelled correctly, train."""
    words = settings(model, here / "run", rollouts=1, **{"evaluation.metrics": "distinct"})
    assert run("train", *words, "--loggers=curves", "--algorithm.args.target_kl=0.1", "--quiet") == 0
    assert "distinct" in (here / "run" / "results.md").read_text() and (here / "run" / "curves.png").is_file()
