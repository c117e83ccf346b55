"""The limits of a configuration, or of a shared run folder: what it may name, read, write and send."""

import importlib
import json
import shutil
import sys

import pytest
import yaml

from agents.configuration.config import EnvConfig, Named, TrainConfig, TrustOptions
from agents.configuration.names import MASK, METRIC
from agents.evaluation.generation import no_reward
from agents.runs.assemble import Parts
from tests.helpers.command import run, settings
from textenv import TextEnv
from textenv.checks.trust import Trust, find_class, only_with
from textenv.rewards import make_reward, read_reward
from textenv.rewards.asynchronous import JUDGE
from textenv.rewards.registry import REWARD

MAIN = "{id: 'agents.cli.main:main', args: {arguments: [train, --allow, os, --out, ../beside/run]}}"
WRITE = "{id: 'agents.files:write_text', args: {file: ../beside/made, text: x}}"
IMPORT = "{id: 'textenv.rewards.registry:import_module', args: {package: antigravity}}"
HOSTILE = {
    "a function": (f"env: {{reward: {MAIN}}}", "agents.cli.main defines, got 'agents.cli.main:main', a function"),
    "a writer": (f"env: {{reward: {WRITE}}}", "got 'agents.files:write_text', a function"),
    "a re-export": (f"env: {{reward: {IMPORT}}}", "got 'textenv.rewards.registry:import_module', a function"),
    "another's class": ("env: {reward: {id: 'textenv.rules:Any'}}", "Expected 'textenv.rules:Any' to be there"),
    "a re-exported class": ("env: {reward: 'textenv.rewards:Length'}", "got 'textenv.rewards:Length', one of"),
    "a class of no such kind": (
        "env: {reward: {id: 'textenv.adapters.python_tool:PythonTool'}}",
        "Expected a BatchReward, or a class with __call__(self, prompt, preds, done) at",
    ),
    "a folder": ("env: {reward: {id: 'agents.runs.folder:RunFolder', args: {path: ../beside}}}", "got another class"),
    "within a sum": (
        f"env: {{reward: {{id: sum, args: {{parts: {{a: {MAIN}}}}}}}}}",
        "got 'agents.cli.main:main', a function",
    ),
    "within a scale": (f"env: {{reward: {{id: scale, args: {{reward: {WRITE}, factor: 1}}}}}}", "a function"),
    "within a gate": (f"env: {{reward: {{id: gate, args: {{condition: vader, reward: {MAIN}}}}}}}", "a function"),
    "within an ensemble": (f"env: {{reward: {{id: ensemble, args: {{rewards: [{MAIN}]}}}}}}", "a function"),
    "within a cache": (f"env: {{reward: {{id: cached, args: {{reward: {IMPORT}}}}}}}", "a function"),
    "a judge": ("env: {reward: {id: async, args: {function: 'os:getcwd'}}}", "add --allow os"),
    "a judge of ours": ("env: {reward: {id: async, args: {function: 'agents.cli.main:main'}}}", "a function"),
    "a learner": (
        "env: {reward: {id: human, args: {db: a.db, learned: {id: 'agents.cli.main:main', args: {arguments: []}}}}}",
        "a function",
    ),
    "a name in the name's place": (
        "env: {reward: {name: 'os:getcwd'}}",
        "Expected env.reward to be {id: NAME, args: {...}}",
    ),
    "an environment's argument": ("env: {args: {reward: {name: 'os:mkdir', path: ../beside/made}}}", "add --allow os"),
    "a metric": (f"evaluation: {{metrics: [{MAIN}]}}", "a class with __call__(self, prompts, texts, references), that"),
    "a reward as metric": (
        "evaluation: {metrics: ['textenv.rewards.rules:Length']}",
        "as a metric is, got another class",
    ),
    "a held-out reward": ("evaluation: {env_args: {reward: 'os:getcwd'}}", "add --allow os"),
    "a mask": (
        f"env: {{masks: [{WRITE}]}}",
        "a class with start(self, vocabulary), or with __call__(self, prompt, preds)",
    ),
    "a logger": (f"loggers: [{MAIN}]", "a KVWriter of Stable-Baselines3, that agents.cli.main defines"),
    "an environment": ("env: {id: 'agents.cli.main:main'}", "Expected a TextEnv, that agents.cli.main defines"),
    "an environment's game": (
        "env: {id: 'textenv.adapters.turn_env:TurnEnv', args: {game: 'os:system'}}",
        "Expected `game` to be a class",
    ),
    "a class path": ("env: {reward: {class_path: antigravity.x}}", "Expected env.reward to be {id: NAME, args: {...}}"),
    "the class path of a group": ("env: {class_path: antigravity.x}", "got the class 'antigravity.x'"),
    "a class path as text": ("model: antigravity.x", "got the class 'antigravity.x'"),
    "a variable": (
        "env: {reward: {id: http, args: {url: 'http://127.0.0.1:9/', api_key_variable: HOME}}}",
        "got 'HOME' in the configuration: if it may be sent to the address that stands there, add --allow_env HOME",
    ),
    "a store elsewhere": ("env: {reward: {id: human, args: {db: ../beside/made.db}}}", "that writes below"),
    "a store of another name": ("env: {reward: {id: human, args: {db: .bash_profile}}}", "with a name in .db"),
    "a model elsewhere": (
        "env: {reward: {id: human, args: {db: a.db, learned: {id: 'agents.supervised.learned_reward:LearnedReward', "
        "args: {folder: ../beside}}}}}",
        "that writes below",
    ),
    "a tracker's address": (
        "loggers: [{id: mlflow, args: {tracking_uri: 'http://127.0.0.1:9'}}]",
        "add --allow mlflow",
    ),
    "many lanes": (
        "algorithm: {n_envs: 100000000}",
        "Expected 1 to 65,536 lanes, got 100,000,000: 64 to 1,024 are usual",
    ),
    "a format": (
        "env: {reward: {id: chat, args: {url: 'http://a', model: m, question: '{prompt:>9999999999}'}}}",
        "alone",
    ),
}


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """Train a run; return its folder."""
    out = tmp_path_factory.mktemp("runs") / "done"
    assert run("train", *settings(model, out, rollouts=2), "--quiet") == 0
    return out


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Work in a folder beside this one, which must stay empty."""
    (tmp_path / "here").mkdir()
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(sys.modules, "mlflow", importlib)  # a stand-in, so that mlflow does not count as missing
    yield tmp_path / "beside"
    assert list((tmp_path / "beside").iterdir()) == [] and "antigravity" not in sys.modules


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_refused_in_one_line(name, beside, model, capfd):
    text, message = HOSTILE[name]
    (beside.parent / "here" / "c.yml").write_text(text)
    assert run("train", "c.yml", "--model.name", model, "--device=cpu", "--out=run", "--quiet") == 2
    err = capfd.readouterr().err
    assert message in " ".join(err.split()), err
    assert err.count("\n") == 1 and err.startswith("textenv: ")


def hostile_run(done, place, text):
    """Copy a run to `place`, and tamper with its configuration."""
    shutil.copytree(done, place)
    config = yaml.safe_load((place / "config.yml").read_text())
    config["env"]["reward"] = {"id": text, "args": {"file": "../beside/made", "text": "x"}}
    config["loggers"] = [text]
    (place / "config.yml").write_text(yaml.safe_dump(config))
    return place


@pytest.mark.parametrize("text", ["agents.files:write_text", "os:system"])
def test_a_hostile_run_folder_is_read_with_the_same_mistrust(text, done, beside, capfd):
    shared = hostile_run(done, beside.parent / "here" / "shared", text)
    for words in (
        ["evaluate", shared],
        ["show", shared],
        ["doctor", shared / "config.yml"],
        ["train", "--resume", shared],
    ):
        assert run(*words) == 2
        err = capfd.readouterr().err
        assert f"'{text}'" in err and err.count("\n") == 1, err


def test_a_verb_builds_only_the_parts_of_a_run_that_it_needs(done, beside, capfd):
    """`generate` and `export` need neither rewards nor loggers, and write the same as for the original run."""
    (beside.parent / "here" / "prompts.txt").write_text("this phone is\n")
    shared = hostile_run(done, beside.parent / "here" / "shared", "os:system")
    texts = []
    for folder in (done, shared):
        assert run("generate", folder, "--prompts=prompts.txt", "--n=4", "--max_new_tokens=8") == 0
        texts.append([json.loads(line)["text"] for line in capfd.readouterr().out.splitlines()])
    assert texts[0] == texts[1] and len(texts[0]) == 4
    assert run("export", shared, "model") == 0


def test_generate_loads_the_policy_of_the_agent(done):
    """`generate` loads only the policy, with the same weights as the agent that the other verbs load."""
    from agents.cli.main import run_config
    from agents.cli.trained_model import load_newest, open_writer

    config = run_config(str(done))
    parts = Parts(config, Trust())
    load_newest(str(done), parts)
    writer = open_writer(str(done), config, TrustOptions())
    own, same = writer.policy.state_dict(), parts.agent.policy.state_dict()
    moved = [name for name in own if not name.startswith("lm.critic.")]
    assert len(moved) > 10 and all((own[name] == same[name]).all() for name in moved)
    fresh = Parts(config, Trust()).agent.policy.state_dict()
    assert any((own[name] != fresh[name]).any() for name in moved), "training has moved them"


# Names that are allowed


def test_the_python_api_takes_functions_and_re_exports_as_before():
    assert make_reward("tests.textenv.checks.test_trust:no_reward") is no_reward
    with (
        only_with(Trust(["tests"])),
        pytest.raises(ValueError, match=r"got 'tests\.textenv\.checks\.test_trust:only_with', a function"),
    ):
        make_reward("tests.textenv.checks.test_trust:only_with")


OWN = """
import sys
from textenv.rewards import Length
class Polite:
    def __call__(self, prompt, preds, done): return 1.0
class Judge:
    async def __call__(self, prompt, preds): return 1.0
class Metric:
    def __call__(self, prompts, texts, references): return {}
class Other:
    def __call__(self, a, b, c): return 1.0
class Mask:
    def __call__(self, prompt, preds): return [1]
def function(prompt, preds, done): return 1.0
"""


def test_the_same_rule_holds_for_what_the_command_allows(tmp_path, monkeypatch):
    (tmp_path / "own_rule.py").write_text(OWN)
    (tmp_path / "own_end.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    trust = Trust(["own_rule", "own_end"])
    accepted = {REWARD: "Polite", JUDGE: "Judge", METRIC: "Metric", MASK: "Mask"}
    for kind in accepted:
        names = [
            name
            for name in ("Polite", "Judge", "Metric", "Other", "Mask", "function", "Length")
            if own(name, kind, trust)
        ]
        # A judge has the signature of a mask. That it returns no tokens is found when it is called.
        assert names == [accepted[kind]] or (kind is MASK and names == ["Judge", "Mask"])
    with only_with(trust):
        assert read_reward({"name": "async", "function": "own_rule:Judge"}).retries == 2
    with pytest.raises(ValueError, match="Expected a module to import, got own_end, which ends the process"):
        find_class("own_end:X", REWARD, trust)
    with pytest.raises(ValueError, match="add --allow own_rule"):
        find_class("own_rule:Polite", REWARD, Trust())


def own(name, kind, trust):
    try:
        return find_class(f"own_rule:{name}", kind, trust)
    except ValueError:
        return None


def test_texts_with_colons_are_not_taken_for_names(model):
    """The colons in an address, a stop string or a pattern do not make `http`, `Human` or `re` modules to import."""
    judge = Named("http", {"url": "http://127.0.0.1:9/score", "on_failure": 0.0})
    args = {"stop_strings": ["Human:", "re:x"]}
    config = TrainConfig(env=EnvConfig("demo", args, reward=judge))
    config.model.name = str(model)
    assert Parts(config, Trust()).env.rules.stop_strings == ("Human:", "re:x")


def test_the_command_line_alone_allows_a_variable(beside, model, monkeypatch, capfd):
    monkeypatch.setenv("OWN_KEY", "secret")
    text = "env: {reward: {id: http, args: {url: 'http://127.0.0.1:9/', api_key_variable: OWN_KEY, retries: 0}}}"
    (beside.parent / "here" / "c.yml").write_text(text)
    words = ["doctor", "c.yml", "--model.name", model, "--device=cpu", "--env.max_new_tokens=4"]
    assert run(*words) == 2 and "add --allow_env OWN_KEY" in capfd.readouterr().err
    (beside.parent / "here" / "c.yml").write_text(f"{text}\nallow_env: [OWN_KEY]")
    assert run(*words) == 2 and "Expected allow_env only on the command line" in capfd.readouterr().err
    (beside.parent / "here" / "c.yml").write_text(text)
    for flag in ("--allow_env", "--allow-env"):
        assert run(*words, flag, "OWN_KEY") == 1  # the doctor reports that nobody answers at that address
        assert "HTTPJudge has no score of" in capfd.readouterr().out


def test_an_env_takes_a_reward_by_name_in_a_configuration_alone():
    with only_with(Trust()), pytest.raises(ValueError, match="add --allow os"):
        TextEnv(["a"], "demo", reward="os:getcwd")
