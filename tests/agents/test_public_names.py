"""The public names of both packages: one loads without the others, and examples and pages need no private names."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import agents
from tests.helpers.command import ROOT
from tests.helpers.documented import PAGES
from tests.whole.public import PUBLIC

FROM = re.compile(r"\bfrom +((?:agents|textenv)(?:\.\w+)*) +import +(?:\(([^)]*)\)|([\w, ]+))")
PLAIN = re.compile(r"^[ >]*import +((?:agents|textenv)\.[\w.]+)", flags=re.MULTILINE)
# agents.files.write_text or agents.files:write_text; but `python -m agents.zoo` starts a program.
DOTTED = re.compile(r"(?<![\w./-])(?<!-m )((?:agents|textenv)(?:\.\w+)+)(?::(\w+))?")


def is_public(module, name):
    """Return whether a name of a module may be used."""
    return name in PUBLIC.get(module, ())


def is_public_path(path):
    """Return whether a dotted path leads to a public name, to an attribute of one, or to a folder of public modules."""
    parts = path.split(".")
    if any(part.startswith("_") and part != "__version__" for part in parts):
        return False
    splits = [(".".join(parts[:n]), parts[n]) for n in range(1, len(parts))]
    return any(is_public(*split) for split in splits) or any(f"{name}.".startswith(f"{path}.") for name in PUBLIC)


def private_imports(text):
    """Return the imports and dotted paths of a script or page that lead to other names than the public ones."""
    problems = [f"import {module}" for module in PLAIN.findall(text) if not is_public_path(module)]
    for module, block, line in FROM.findall(text):
        names = [name.split(" as ")[0] for name in re.split(r"\s*,\s*", (block or line).strip()) if name]
        problems += [f"from {module} import {name}" for name in names if not is_public(module, name)]
    for path, name in DOTTED.findall(PLAIN.sub("", FROM.sub("", text))):
        whole = f"{path}.{name}" if name else path
        problems += [f"{path}:{name}" if name else path] if not is_public_path(whole) else []
    return problems


def test_examples_and_pages_import_public_names_alone():
    """Benchmarks are left out: they measure caches, masks and minibatches on their own."""
    paths = [path for pattern in (*PAGES, "examples/**/*.py", "examples/**/*.yml") for path in ROOT.glob(pattern)]
    paths = [path for path in paths if path.name != "CHANGELOG.md"]
    found = {str(path): private_imports(path.read_text(encoding="utf-8")) for path in paths}  # several README.md
    assert len(found) > 20
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("from agents import KLPenalty, make_agent\nfrom textenv import TextEnv", []),
        ("from textenv.rewards.classifier import Classifier\nimport textenv.tasks.hh", []),
        ("from agents.files import write_text", ["from agents.files import write_text"]),
        ("from agents import (\n    KLPenalty,\n    files,\n)", ["from agents import files"]),
        (
            "```python\nfrom textenv.masks.token_masks import MinLengthMask\n```",
            ["from textenv.masks.token_masks import MinLengthMask"],
        ),
        ('python -c "from textenv import hub; hub"', ["from textenv import hub"]),
        ("import textenv.episodes.scores", ["import textenv.episodes.scores"]),
        (
            "from textenv.rewards.classifier import Classifier, _Labels",
            ["from textenv.rewards.classifier import _Labels"],
        ),
        ("from textenv.rewards.overlap import ROUGE", ["from textenv.rewards.overlap import ROUGE"]),  # the room has it
        ("import textenv.rewardsome", ["import textenv.rewardsome"]),
        ("import agents\nagents.files.write_text(file, text)", ["agents.files.write_text"]),
        ("import textenv\ntextenv.masks.token_masks.MinLengthMask(3)", ["textenv.masks.token_masks.MinLengthMask"]),
        ("import textenv\ntextenv.rewards.overlap._OverlapReward()", ["textenv.rewards.overlap._OverlapReward"]),
        ("import agents\nagents.sft.tune(lm)\nagents.KLPenalty._on_step\n", ["agents.KLPenalty._on_step"]),
        ("import textenv.rewards\ntextenv.rewards.make_reward('length')\nprint(textenv.__version__)", []),
        ("env: {reward: {id: 'agents.files:write_text'}}", ["agents.files:write_text"]),
        ("env: {reward: {id: 'textenv.rewards.classifier:Classifier'}}\npolicy: agents.zoo.policies.DemoPolicy", []),
        ("the tests are in tests.agents.files, and agents/files.py is a file", []),
    ],
)
def test_a_private_import_is_found(text, problems):
    assert private_imports(text) == [*problems]


def test_type_checkers_see_the_names_that_are_loaded():
    tree = ast.parse(Path(agents.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [(node.module, alias.asname) for node in block.body for alias in node.names]
    seen = {name: ".".join(["", *filter(None, [module, name in agents.MODULES and name])]) for module, name in imports}
    assert seen == {**agents.MODULES, **agents.NAMES}
    assert list(agents.NAMES) == sorted(agents.NAMES) and not agents.MODULES.keys() & agents.NAMES.keys()


def test_every_name_is_there_and_is_its_modules_own():
    for name, module in agents.NAMES.items():
        assert getattr(agents, name) is vars(import_module(module, "agents"))[name], name
    for name, module in agents.MODULES.items():
        assert getattr(agents, name) is import_module(module, "agents")
    assert set(agents.__all__) <= set(dir(agents))


def loaded_after(statement):
    """Return the modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_configurations_are_loaded_without_torch():
    assert not loaded_after("from agents import TrainConfig, KLConfig") & {
        "torch",
        "gymnasium",
        "agents.policies",
    }


@pytest.mark.slow
def test_one_name_does_not_load_the_others():
    loaded = loaded_after("from agents import KLPenalty")
    others = {"agents.doctor", "agents.supervised.sft", "agents.evaluation.evaluation"}
    assert "torch" in loaded and not loaded & others
    assert others <= loaded_after("from agents import *")
