"""The checks of a configuration's values: the range of every number, single names as lists, and types in words."""

import re
import typing
from dataclasses import fields, is_dataclass

import pytest

from agents.cli import options as verb_config
from agents.cli.arguments import make_parser, parse
from agents.configuration.config import TrainConfig
from agents.configuration.search import TuneConfig
from agents.configuration.values import LIMITS, as_list, in_words, limits_of

CONFIGS = (  # `CriticConfig` has all keys of `TrainConfig`, and its own
    *(verb_config.CriticConfig, verb_config.EvaluateOptions, verb_config.GenerateOptions, verb_config.ChatOptions),
    *(verb_config.ShowOptions, verb_config.SFTConfig, verb_config.ClassifierConfig),
    *(verb_config.RewardModelConfig, verb_config.RateConfig),
)


def numbers_of(config, above=""):
    """Yield the dotted names of all keys that take a number."""
    for field in fields(config):
        kind = typing.get_type_hints(config)[field.name]
        if is_dataclass(kind):
            yield from numbers_of(kind, f"{above}{field.name}.")
        elif {int, float} & {kind, *typing.get_args(kind)}:
            yield above + field.name


NUMBERS = [(config, key) for config in CONFIGS for key in numbers_of(config)]
NUMBERS += [(TuneConfig, key) for key in numbers_of(TuneConfig) if key in ("trials", "tune.max_kl")]


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
        assert re.fullmatch(rf"Expected {key} to be (above )?[012]\b.*, got -1(\.0)?\.", low)
    else:
        assert float(low) == -1
    for value in (".nan", ".inf", "-.inf", "many"):
        assert str(as_a_value(config, key, value)).startswith(f"Expected {key} to be ")
    if limits.above or limits.low == 1:
        assert re.fullmatch(rf"Expected {key} to be .*, got 0(\.0)?\.", str(as_a_value(config, key, 0)))
    least = 2 if limits.low == 2 else 1
    assert str(as_a_value(config, key, least)) in (f"{least}", f"{least}.0")


def test_no_range_is_of_a_key_that_is_none():
    assert {key.rpartition(".")[2] for _, key in NUMBERS} == LIMITS.keys()
    with pytest.raises(KeyError):
        limits_of("algorithm.name")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
