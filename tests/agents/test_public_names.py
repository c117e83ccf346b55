"""The public names of both packages: one loads without the others, and examples and pages need no private names."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import agents
import textenv
from tests.helpers.command import ROOT
from tests.helpers.documented import PAGES

ROOMS = ("textenv.adapters", "textenv.feedback", "textenv.metrics", "textenv.rewards", "textenv.tasks")
FROM = re.compile(r"\bfrom +((?:agents|textenv)(?:\.\w+)*) +import +(?:\(([^)]*)\)|([\w, ]+))")
PLAIN = re.compile(r"^[ >]*import +((?:agents|textenv)\.[\w.]+)", flags=re.MULTILINE)


def private_imports(text):
    """Return the imports of a script or page that are neither public names nor from one of the public `ROOMS`."""
    problems = [f"import {module}" for module in PLAIN.findall(text) if not module.startswith(ROOMS)]
    for module, block, line in FROM.findall(text):
        names = [name.split(" as ")[0] for name in re.split(r"\s*,\s*", (block or line).strip()) if name]
        public = {"agents": agents.__all__, "textenv": textenv.__all__}.get(module)
        if public is None and not f"{module}.".startswith(tuple(f"{room}." for room in ROOMS)):
            public = ()
        problems += [f"from {module} import {name}" for name in names if public is not None and name not in public]
    return problems


def test_examples_and_pages_import_public_names_alone():
    """Benchmarks are left out: they measure caches, masks and minibatches on their own."""
    paths = [path for pattern in (*PAGES, "examples/**/*.py", "examples/**/*.yml") for path in ROOT.glob(pattern)]
    paths = [path for path in paths if path.name != "CHANGELOG.md"]
    found = {path.name: private_imports(path.read_text(encoding="utf-8")) for path in paths}
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
