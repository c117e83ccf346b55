"""The classes that a configuration may name: every callable of both packages, in every place that takes a name."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from functools import cache

import pytest

import agents
import textenv
from agents import word_tokenizer
from agents.configuration.config import EnvConfig, Named
from agents.configuration.names import MASK, MASKS, METRIC, build
from agents.errors import CommandError
from agents.policies.surrogate_names import SURROGATE, make_surrogate
from agents.runs.advantage_names import ADVANTAGE, make_advantage
from agents.runs.assemble import ENV, make_env, make_metric
from agents.runs.loggers import LOGGER, check_loggers
from tests.helpers.command import environment
from textenv import demo
from textenv.checks.trust import Trust, find_class
from textenv.rewards.asynchronous import JUDGE
from textenv.rewards.registry import REWARD
from textenv.rewards.steps import SCORER


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Work in a folder beside this one, which must stay empty."""
    (tmp_path / "here").mkdir()
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "beside"
    assert list((tmp_path / "beside").iterdir()) == []


@cache
def members():
    """Return the path of every callable in our modules, defined there or imported."""
    paths = []
    for package in (textenv, agents):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            loaded = importlib.import_module(module.name)
            paths += [f"{module.name}:{name}" for name, value in vars(loaded).items() if callable(value)]
    return paths


def fitting(kind):
    """Return the paths that may be named where a kind is expected."""
    return sorted(path for path in members() if fits(path, kind))


def fits(path, kind):
    try:
        return isinstance(find_class(path, kind, Trust()), type)
    except ValueError:
        return False


COMPOSED = "Cached Clip Ensemble Gate Scale WeightedSum"
# The reviewed classes: whoever adds one has asked what it can do with a stranger's arguments.
LOOKED_AT = {
    REWARD: {
        "agents.supervised.learned_reward": "LearnedReward",
        "agents.cli.rate_training": "FirstEpisodes",
        "textenv.adapters.reasoning_gym": "ReasoningScore",
        "textenv.rewards.asynchronous": "AsyncFunction",
        "textenv.rewards.chinese": "SnowNLP",
        "textenv.rewards.classifier": "Classifier",
        "textenv.rewards.compose": COMPOSED,
        "textenv.rewards.http_judge": "ChatJudge HTTPJudge",
        "textenv.rewards.human": "HumanReward",
        "textenv.rewards.lexicon": "Vader",
        "textenv.rewards.likelihood": "Likelihood",
        "textenv.rewards.overlap": "BLEU ChrF METEOR ROUGE SacreBLEU",
        "textenv.rewards.preference": "Preference",
        "textenv.rewards.process_model": "ProcessReward",
        "textenv.rewards.rules": "Format Keyword Length Regex Repetition Zero",
        "textenv.rewards.similarity": "Similarity",
        "textenv.rewards.steps": "StepReward",
        "textenv.tasks.each_turn": "EachTurn",
        "textenv.tasks.increasing_numbers": "Increasing",
    },
    JUDGE: {},
    SCORER: {},
    SURROGATE: {"agents.policies.surrogates": "CISPO ClipHigher DualClip GSPO SoftGate"},
    ADVANTAGE: {},
    METRIC: {
        "textenv.metrics.model": "IntentAccuracy Perplexity",
        "textenv.metrics.overlap": "BLEU ChrF METEOR ROUGE SacreBLEU",
        "textenv.metrics.surface": "Broken Distinct Length",
    },
    MASK: {
        "textenv.masks.grammar": "GrammarMask JSONSchemaMask RegexMask _Matching",
        "textenv.masks.token_masks": "AllowedMask BannedMask MinLengthMask _FunctionMask",
    },
    LOGGER: {"agents.runs.loggers": "TensorBoard", "agents.runs.recording": "RowWriter"},
    ENV: {
        "textenv.adapters.reasoning_gym": "ReasoningGym",
        "textenv.adapters.turn_env": "TurnEnv",
        "textenv.env": "TextEnv",
        "textenv.tasks.dailydialog": "Conversation DailyDialog",
        "textenv.tasks.dates": "Dates",
        "textenv.tasks.demo": "Demo",
        "textenv.tasks.hh": "HH",
        "textenv.tasks.increasing_numbers": "IncreasingNumbers",
        "textenv.tasks.reviews": "Reviews",
        "textenv.tasks.zh_reviews": "ZhReviews",
    },
}


@pytest.mark.parametrize("kind", LOOKED_AT, ids=lambda kind: kind.name)
def test_only_reviewed_classes_may_be_named(kind):
    assert len(members()) > 1500
    listed = [f"{module}:{name}" for module, names in LOOKED_AT[kind].items() for name in names.split()]
    assert fitting(kind) == sorted(listed)


def in_every_place(path, arguments, tokenizer):
    """Yield the ways in which a configuration builds a named object, each as a function."""
    reward = {"name": path, **arguments}
    yield lambda: make_env(EnvConfig("text", arguments, "p.txt", Named(path, arguments)), tokenizer, 0, Trust())
    yield lambda: make_env(EnvConfig(path, arguments), tokenizer, 0, Trust())
    yield lambda: make_env(EnvConfig("Dates", {"reward": reward}), tokenizer, 0, Trust())
    for outer in ({"name": "scale", "reward": reward, "factor": 1.0}, {"name": "async", "function": path}):
        yield lambda outer=outer: make_env(EnvConfig("Dates", {"reward": outer}), tokenizer, 0, Trust())
    steps = {"name": "steps", "function": path}
    yield lambda: make_env(EnvConfig("Dates", {"reward": steps}), tokenizer, 0, Trust())
    yield lambda: build(Named(path, arguments), MASKS, MASK, Trust())
    yield lambda: make_surrogate(Named(path, arguments), Trust())
    yield lambda: make_advantage(Named(path, arguments), Trust())
    yield lambda: make_metric(Named(path, arguments), Trust())
    yield lambda: check_loggers([Named(path, arguments)], Trust())


@pytest.mark.slow
def test_every_callable_in_every_place_is_refused_or_harmless(beside):
    """Each is built without arguments and, if it may be named, with paths into the other folder as arguments."""
    tokenizer = word_tokenizer(demo.vocabulary())
    named = {path for kind in LOOKED_AT for path in fitting(kind)}
    n_built = n_refused = 0
    for path in members():
        module, _, name = path.partition(":")
        takes = list(inspect.signature(vars(sys.modules[module])[name]).parameters) if path in named else []
        for arguments in [
            {},
            *({key: str(beside / "made") for key in keys} for keys in (takes, *([key] for key in takes))),
        ]:
            for make in in_every_place(path, arguments, tokenizer):
                try:
                    make()
                except (CommandError, ValueError, TypeError, ImportError, OSError):
                    n_refused += 1
                else:
                    n_built += 1
                assert list(beside.iterdir()) == [], (path, arguments)
    assert n_built > 20 and n_refused > 10_000


@pytest.mark.slow
def test_importing_any_module_of_ours_does_nothing(tmp_path):
    """A module is imported before its name can be refused."""
    modules = sorted({path.partition(":")[0] for path in members()})
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    command = [sys.executable, "-c", code, *modules]
    process = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "") and not list(tmp_path.iterdir())
