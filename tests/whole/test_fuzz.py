"""Thousands of broken configurations and prompt files: each ends in one line and an exit code, and changes no file."""

import random
import re
from types import SimpleNamespace

import pytest
import yaml

from agents import word_tokenizer
from agents.cli import trained_model as verbs
from agents.configuration.config import EnvConfig, Named
from agents.errors import HANDLED, CommandError
from agents.evaluation.generation import no_reward
from agents.runs.assemble import make_env, make_metric
from agents.runs.exit_codes import as_command_error
from agents.runs.loggers import check_loggers
from tests.helpers.command import run, small_model
from textenv import CharTokenizer, TextEnv, demo
from textenv.checks.trust import Trust

N_CONFIGURATIONS = 60
N_PARTS = 6000
N_FILES = 2000

BASE = {
    "seed": 1,
    "env": {
        "id": "text",
        "prompts": "prompts.txt",
        "max_new_tokens": 4,
        "args": {"stop_strings": ["."], "max_prompt_tokens": 8, "truncation_side": "left"},
        "reward": {"id": "sum", "args": {"parts": {"a": {"id": "length", "args": {"target": 3}}, "b": "repetition"}}},
        "on_failure": 0.0,
        "masks": [{"id": "min_length", "args": {"n_tokens": 2}}],
    },
    "algorithm": {"name": "maskable_ppo", "n_envs": 4, "n_steps": 4, "args": {"target_kl": 0.1}},
    "evaluation": {"metrics": ["distinct", {"id": "words", "args": {}}], "env_args": {"seed": 3}},
    "loggers": ["curves"],
}
VALUES = [
    None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 5000, "\ud800", "\0", "a:b", "demo", "length", "Dates",
    "../beside/x.db", "os:system", "agents.cli.main:main", "agents.files:write_text", "human", "http", "async", "HH",
    "textenv.rewards.registry:import_module", "agents.supervised.learned_reward:LearnedReward",
    "textenv.adapters.python_tool:PythonTool", [], {}, [[]], [None], {"id": 3}, {"name": 1}, {1: 2},
    {"id": "length", "args": []}, {"id": "length", "args": {"target": {}}}, {"id": {}, "args": {}},
    {"class_path": "os.system"}, {"class_path": "antigravity.x", "init_args": {}},
    {"id": "human", "args": {"db": "../beside/x.db"}}, {"id": "human", "args": {"db": "../beside/x"}},
    {"id": "http", "args": {"url": "http://127.0.0.1:9/", "api_key_variable": "HOME"}},
    {"id": "agents.cli.main:main", "args": {"arguments": ["tasks"]}}, {"name": "os:mkdir", "path": "../beside/made"},
    {"id": "regex", "args": {"pattern": "("}}, {"id": "json_schema", "args": {"schema": "{"}},
]  # fmt: skip


def paths(value, at=()):
    """Yield the path to every value inside `value`."""
    yield at
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(child, (*at, key))


def changed(value, at, new):
    """Return a copy with another value at a path."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = changed(copy[at[0]], at[1:], new)
    return copy


def mutated(draw):
    """Return a configuration with one or two wrong values."""
    config = BASE
    for _ in range(draw.randint(1, 2)):
        config = changed(config, draw.choice(list(paths(config))[1:]), draw.choice(VALUES))
    return config


def torn(draw, text):
    """Return the bytes of a text, which is damaged at one place in 30 % of the cases."""
    if draw.random() < 0.3:
        start, new = (
            draw.randrange(len(text)),
            draw.choice(["", "&a *a", "\t", "[", "{", "!!python/name:os.system ", "\x01"]),
        )
        text = text[:start] + new + text[start + 3 :]
    return text.encode("utf-8", "surrogatepass")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Work in a folder `here`, beside a folder that must not change; return their parent."""
    (tmp_path / "here").mkdir()
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "prompts.txt").write_text("this phone is\nthat film was\n")
    return tmp_path


def untouched(root):
    return {str(path): path.read_text() for path in (root / "beside").rglob("*")} == {
        str(root / "beside" / "thesis.txt"): "years of work"
    }


@pytest.mark.slow
def test_configurations(root, monkeypatch, capfd):
    small_model(root / "model")
    monkeypatch.setattr(verbs, "check", lambda agent: SimpleNamespace(ok=True))  # only building the run is tested
    draw, codes = random.Random(0), []
    words = ["--model.name", root / "model", "--device", "cpu"]
    for number in range(N_CONFIGURATIONS):
        text = torn(draw, yaml.safe_dump(mutated(draw), allow_unicode=True))
        (root / "here" / "c.yml").write_bytes(text)
        code = run("doctor", "c.yml", *words)
        err = capfd.readouterr().err
        codes.append(code)
        assert code in (0, 2), (number, code, err, text)
        assert "Traceback" not in err and (code == 0 or re.search("^textenv: [^\n]+\n\\Z", err, re.M)), (
            number,
            err,
            text,
        )
        assert untouched(root), (number, text)
    assert codes.count(0) > 5 and codes.count(2) > N_CONFIGURATIONS / 2


@pytest.mark.slow
def test_parts(root):
    """The same without the parser, which takes a quarter of a second: names and arguments that it would accept."""
    tokenizer, draw, n_built = word_tokenizer(demo.vocabulary()), random.Random(1), 0
    for number in range(N_PARTS):
        config = mutated(draw)
        try:
            build_parts(config, tokenizer)
            n_built += 1
        except NotAConfiguration:
            continue
        except Exception as error:
            assert isinstance(error, (CommandError, *HANDLED)), (number, config)
            assert as_command_error(error, root).code == 2, (number, config, error)
        assert untouched(root), (number, config)
    assert n_built > N_PARTS / 20


def build_parts(config, tokenizer):
    env, metrics, loggers = parsed(config, "env"), parsed(config, "evaluation")["metrics"], config["loggers"]
    if not isinstance(loggers, list) or not isinstance(metrics, list):
        raise NotAConfiguration
    check_loggers(list(map(named, loggers)), Trust())
    if not isinstance(env["args"], dict) or not isinstance(env["masks"], list) or not isinstance(env["id"], str):
        raise NotAConfiguration
    names = {"reward": env["reward"] and named(env["reward"]), "masks": list(map(named, env["masks"]))}
    make_env(EnvConfig(**{**env, **names}), tokenizer, 0, Trust())
    for metric in metrics:
        make_metric(named(metric), Trust())


def parsed(config, key):
    """Return a group of the configuration, if all of its keys are known."""
    if not isinstance(config[key], dict) or config[key].keys() != BASE[key].keys():
        raise NotAConfiguration
    return config[key]


class NotAConfiguration(Exception):
    """The parser would refuse the configuration."""


def named(value):
    """Return a name as the parser would return it."""
    is_named = isinstance(value, dict) and value.keys() == {"id", "args"} and isinstance(value["id"], str)
    if is_named and isinstance(value["args"], dict) and all(isinstance(key, str) for key in value["args"]):
        return Named(value["id"], value["args"])
    if not isinstance(value, str):
        raise NotAConfiguration
    return value


FIXED = (
    (".jsonl", b"[" * 100_000), (".jsonl", b"1" * 5000), (".jsonl", b'"\\ud800"'), (".jsonl", b'"' + b"x" * 4_000_001),
    (".csv", b"prompt\n" + b"x" * 4_000_001), (".csv", b'prompt\n"' + b"x\n" * 3_000_000), (".csv", b"prompt\na,b"),
    (".csv", b"prompt\n\0"), (".txt", b"x" * 50_000_000), (".txt", b"\xff"), (".jsonl", b"NaN"), (".jsonl", b"{}"),
)  # fmt: skip
SOUND = {
    ".jsonl": b'{"prompt": "ab", "references": ["a"], "max_new_tokens": 2}\n"b"\n[1, 2]\n',
    ".csv": b'prompt,label\n"a,b",1\nb,2\n',
    ".txt": b"ab\nb\n",
}


@pytest.mark.slow
def test_prompt_files(root):
    draw, n_read = random.Random(2), 0
    files = [*FIXED, *(broken(draw) for _ in range(N_FILES))]
    for number, (ending, content) in enumerate(files):
        file = root / "here" / f"prompts{ending}"
        file.write_bytes(content)
        try:
            env = TextEnv(str(file), CharTokenizer("ab"), reward=no_reward, max_new_tokens=2)
            env.reset(seed=0)
            n_read += 1
        except ValueError as error:
            assert number >= len(FIXED) or "Expected" in str(error), (content[:80], error)
    assert N_FILES / 20 < n_read < len(files)


def broken(draw):
    """Return the suffix and the content of a file of prompts with some bytes changed."""
    ending = draw.choice(list(SOUND))
    content = bytearray(SOUND[ending])
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        content[at : at + draw.randint(0, 3)] = draw.choice(
            [
                b"",
                b"\0",
                b"\xff",
                b'"',
                b"{",
                b"[",
                b",",
                b"\n",
                b"null",
                b"1e999",
                b"\\ud800",
                bytes([draw.randrange(256)]),
            ]
        )
    return ending, bytes(content)
