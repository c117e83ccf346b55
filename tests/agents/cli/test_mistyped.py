"""Typing mistakes in commands, configurations and data: exit code 2, and one line with the cause and the cure."""

import json
import re
import shutil
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from agents.cli import options as verb_config
from agents.cli.arguments import make_parser, parse
from agents.cli.stages import ENOUGH
from agents.configuration.config import TrainConfig
from agents.configuration.stage_folders import made_by
from agents.configuration.values import LIMITS, as_list, in_words, limits_of
from tests.helpers.command import ROOT, run, settings
from textenv import TASKS, TextEnv
from textenv.checks.signatures import check_arguments, needed
from textenv.rewards import make_reward

CONFIGS = (
    *(TrainConfig, verb_config.EvaluateOptions, verb_config.GenerateOptions, verb_config.ChatOptions),
    *(verb_config.ShowOptions, verb_config.SFTConfig, verb_config.ClassifierConfig),
    *(verb_config.RewardModelConfig, verb_config.RateConfig),
)
CONFIG_FOLDER = ROOT / "examples" / "configs"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capfd, *words):
    """Run a command that is refused and leaves no file; return the one line that it prints."""
    before = files_here()
    code = run(*words)
    error = capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert files_here() == before
    return error


def files_here():
    return {path for path in Path.cwd().rglob("*") if path.is_file()}


def numbers_of(config, above=""):
    """Yield the dotted names of all keys that take a number."""
    for field in fields(config):
        kind = typing.get_type_hints(config)[field.name]
        if is_dataclass(kind):
            yield from numbers_of(kind, f"{above}{field.name}.")
        elif {int, float} & {kind, *typing.get_args(kind)}:
            yield above + field.name


NUMBERS = [(config, key) for config in CONFIGS for key in numbers_of(config)]


def as_a_value(config, key, value):
    """Return the value that a parser reads for a key, or the text of its refusal."""
    parser = make_parser("verb", "[CONFIG.yml]", config)
    # A field without a default has MISSING as both; it is a positional argument of the command.
    positional = [field.name for field in fields(config) if field.default is field.default_factory]
    try:
        return parse(parser, ["x" for _ in positional] + [f"--{key}={value}"])[key]
    except Exception as error:
        return str(error)


@pytest.mark.parametrize(("config", "key"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_every_number_has_its_range_and_is_refused_outside(config, key):
    limits = limits_of(key)
    low = str(as_a_value(config, key, -1))
    if limits.low >= 0:
        assert re.fullmatch(rf"Expected {key} to be (above )?[01]\b.*, got -1(\.0)?\.", low)
    else:
        assert float(low) == -1
    for value in (".nan", ".inf", "-.inf", "many"):
        assert str(as_a_value(config, key, value)).startswith(f"Expected {key} to be ")
    if limits.above or limits.low == 1:
        assert re.fullmatch(rf"Expected {key} to be .*, got 0(\.0)?\.", str(as_a_value(config, key, 0)))
    assert str(as_a_value(config, key, 1)) in ("1", "1.0")


def test_no_range_is_of_a_key_that_is_none():
    assert {key.rpartition(".")[2] for _, key in NUMBERS} == LIMITS.keys()
    with pytest.raises(KeyError):
        limits_of("algorithm.name")


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
        ("--resume", "argument --resume: expected one argument."),
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
    flag = "--env.prompts FILE" if needs == ["prompts"] else "--env.args.data FOLDER"
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


def test_one_name_is_a_list_of_one_in_commands_and_files(here):
    def of(*words):
        parser = make_parser("train", "[CONFIG.yml]", TrainConfig)
        config = parse(parser, [*words])
        return config.evaluation.metrics, config.loggers, config.env.masks

    (here / "one.yml").write_text("evaluation: {metrics: rouge}\nloggers: curves\nenv: {masks: {id: allowed}}\n")
    (here / "lists.yml").write_text(
        "evaluation: {metrics: [rouge]}\nloggers: [curves]\nenv: {masks: [{id: allowed}]}\n"
    )
    words = ["--evaluation.metrics=rouge", "--loggers=curves", "--env.masks={id: allowed}"]
    assert of("--config", "one.yml") == of("--config", "lists.yml") == of(*words)
    assert of(*words)[:2] == (["rouge"], ["curves"])
    assert of("--evaluation.metrics=[rouge, distinct]")[0] == ["rouge", "distinct"]
    parser = make_parser("evaluate", "RUN", verb_config.EvaluateOptions)
    assert parse(parser, ["run", "--metrics", "distinct"]).metrics == ["distinct"]
    parser = make_parser("classifier", "[CONFIG.yml]", verb_config.ClassifierConfig)
    assert parse(parser, ["--labels", "good"]).labels == ["good"]
    assert as_list("null") == "null" and as_list(3) == 3


def test_types_in_words():
    assert in_words(int | None) == "a whole number or null"
    assert in_words(list[str]) == "a list, as [ONE, ANOTHER], each a text"


# A configuration before its stages


@pytest.mark.parametrize(
    ("verb", "name", "folder", "maker"),
    [
        ("train", "reviews", "runs/reviews/tuned", "textenv sft examples/configs/reviews_sft.yml --data FOLDER"),
        ("train", "hh", "runs/hh/tuned", "textenv sft examples/configs/hh_sft.yml"),
        ("train", "dates", "runs/dates/base", "textenv sft examples/configs/dates_sft.yml --out runs/dates/base"),
        ("train", "dailydialog_gpt2", "runs/dailydialog_gpt2/tuned", "textenv sft --task DailyDialog --data FOLDER"),
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
