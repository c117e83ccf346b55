"""The ranges of a search: their forms, their values, and the refusal of mistakes in plain words."""

import re

import pytest

from agents.configuration.config import TrainConfig
from agents.configuration.search import Range, read_ranges, value_at
from agents.errors import CommandError


def test_ranges_by_hand():
    nested = {"kl": {"coef": {"choices": [0, None, {"b": 1, "a": 2}, "gae"]}}}
    coef, rate = read_ranges({"kl": nested["kl"], "algorithm.learning_rate": {"low": 1e-5, "high": 0.1, "log": True}})[
        ::-1
    ]
    assert rate == Range("algorithm.learning_rate", 1e-5, 0.1, log=True)
    assert rate.words([1e-5, 0.5]) == ["--algorithm.learning_rate=1e-05", "--algorithm.learning_rate=0.5"]
    assert [rate.has(value) for value in (1e-6, 1e-5, 0.1, 0.2, "0.05", None)] == [False, True, True, *[False] * 3]
    assert coef.key == "kl.coef" and coef.names == ("0", "null", '{"a": 2, "b": 1}', '"gae"')
    assert coef.ends == coef.names and [coef.value(name) for name in coef.names] == nested["kl"]["coef"]["choices"]
    assert coef.words(coef.names)[2:] == ['--kl.coef={"b": 1, "a": 2}', "--kl.coef=gae"]
    assert coef.has('"gae"') and not coef.has("gae")


def test_a_value_by_its_dotted_key():
    config = TrainConfig()
    config.algorithm.args = {"ent_coef": 0.5}
    assert value_at(config, "algorithm.args.ent_coef") == 0.5 and value_at(config, "total_tokens") == 100_000


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({}, "Expected ranges to search in, got none"),
        ({"kl.coef": 0.1}, "Expected tune.ranges.kl.coef as {low: .., high: ..} or {choices: [..]}, got 0.1"),
        ({"kl.coef": {"low": 0.1}}, "got {'low': 0.1}"),
        ({"kl.coef": {"low": 0.1, "high": 0.0}}, "Expected low below high in tune.ranges.kl.coef"),
        ({"kl.coef": {"low": 0.1, "high": 0.1}}, "Expected low below high"),
        ({"kl.coef": {"low": 0.0, "high": float("nan")}}, "Expected low below high"),
        ({"kl.coef": {"low": 0.0, "high": float("inf")}}, "Expected low below high"),
        ({"kl.coef": {"low": 0.0, "high": 1.0, "log": True}}, "Expected low above 0 in tune.ranges.kl.coef with log"),
        ({"kl.coef": {"low": 0.1, "high": 1.0, "log": "yes"}}, "log true or false, got 0.1, 1.0 and 'yes'"),
        ({"kl.coef": {"low": "a", "high": 1.0}}, "Expected numbers as low and high of tune.ranges.kl.coef, got 'a'"),
        ({"kl.coef": {"low": 0.1, "high": 1.0, "step": 2}}, "with low, high, log alone, got step as well"),
        ({"kl.coef": {"choices": [1], "log": True}}, "with choices alone, got log as well"),
        ({"kl.coef": {"choices": []}}, "Expected choices of tune.ranges.kl.coef as a list"),
        ({"kl.coef": {"choices": [1, 1]}}, "Expected each choice of tune.ranges.kl.coef once"),
        ({"kl.coef": {"choices": [1]}, "kl": {"coef": {"choices": [2]}}}, "Expected each key once"),
        ({"seed": {"choices": [1]}}, "Expected a key that changes training and not its measure"),
        ({"evaluation.n": {"choices": [1]}}, "got 'evaluation.n'"),
        ({"tune.max_kl": {"low": 1, "high": 2}}, "got 'tune.max_kl'"),
    ],
)
def test_mistakes_are_refused(ranges, message):
    with pytest.raises(CommandError, match=re.escape(message)):
        read_ranges(ranges)
