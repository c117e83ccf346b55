"""The declaration of imports in setup.cfg: at a module's head in `install_requires`, in a function in a guarded extra.

The sources and setup.cfg are read, so that the result does not depend on the packages that are installed.
"""

import ast
import configparser
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.helpers.house import ROOT, Source, assert_none, imports, read, root_modules, source

FOLDERS = ("textenv", "agents", "examples", "benchmarks")
OWN = {"textenv", "agents", "textenv_agents", "textenv_command"}
# Modules whose package has another name.
PACKAGES = {"PIL": "pillow", "gem": "gem-llm", "yaml": "pyyaml"}
# The only modules that may import packages of an extra at their head, each with the extra. No other module imports them
# at its head. None means an environment of its own, which the benchmark names if it is missing.
LATE = {
    "textenv/feedback/connections.py": "feedback",
    "textenv/feedback/guard.py": "feedback",
    "textenv/feedback/web.py": "feedback",
    "benchmarks/trl_grpo.py": None,
    "benchmarks/trl_peer.py": None,
    "benchmarks/trl_ppo.py": None,
}


class Declared(NamedTuple):
    """The packages of setup.cfg: the required ones, and those of each extra."""

    required: set[str]
    extras: dict[str, set[str]]


class Import(NamedTuple):
    """An import statement, when it runs ("head", "call" or never: "typing"), and the extra that guards it."""

    node: ast.Import | ast.ImportFrom
    when: str
    guard: str | None


def package_of(name: str) -> str:
    return re.sub(r"[-_.]+", "-", PACKAGES.get(name, name)).lower()


def declared(text: str) -> Declared:
    config = configparser.ConfigParser()
    config.read_string(text)

    def packages(lines: str) -> set[str]:
        return {package_of(re.match(r"[\w.-]+", line)[0]) for line in lines.split("\n") if line and line[0] != "#"}

    extras = {extra: packages(lines) for extra, lines in config["options.extras_require"].items() if extra != "dev"}
    return Declared(packages(config["options"]["install_requires"]), extras)


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def constants(call: ast.AST, *functions: str) -> list[str | None]:
    """Return the arguments of a call of one of the functions, None for those that are no literals; else []."""
    if not isinstance(call, ast.Call) or ast.unparse(call.func).split(".")[-1] not in functions:
        return []
    return [argument.value if isinstance(argument, ast.Constant) else None for argument in call.args]


def import_statements(node: ast.AST, when: str = "head", guard: str | None = None) -> Iterator[Import]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield Import(node, when, guard)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        when = "call"
    if isinstance(node, ast.If) and is_type_checking(node):
        for statement in node.body:
            yield from import_statements(statement, "typing", guard)
        for statement in node.orelse:
            yield from import_statements(statement, when, guard)
        return
    if isinstance(node, ast.With):
        for item in node.items:
            guard = (constants(item.context_expr, "needs") or [guard])[0]
    for child in ast.iter_child_nodes(node):
        yield from import_statements(child, when, guard)


def undeclared(files: list[Source], known: Declared, late: dict[str, str | None]) -> list[str]:
    """Find imports of packages that may be missing, and are neither listed in `late` nor guarded."""
    beside = {
        file.path.rpartition("/")[0] + "/" + file.module.split(".")[-1] for file in files
    }  # a script's neighbours
    problems = []
    for file in files:
        for statement in import_statements(file.tree):
            for imported in imports(file, [statement.node]):
                root = imported.module.split(".")[0]
                if imported.relative or root in OWN or root in sys.stdlib_module_names:
                    continue
                if file.folder not in OWN and f"{file.path.rpartition('/')[0]}/{root}" in beside:
                    continue
                if problem := _why_not(statement, root, file.path, known, late):
                    problems.append(f"{file.path}:{imported.line}: {problem}")
    return problems


def _why_not(statement: Import, root: str, path: str, known: Declared, late: dict[str, str | None]) -> str | None:
    package = package_of(root)
    extras = {extra for extra, packages in known.extras.items() if package in packages}
    if package in known.required or (statement.when == "head" and path in late and late[path] is None):
        return None
    if statement.when == "head" and late.get(path) not in extras:
        return f"imports {root} at its head, and install_requires lacks {package}"
    if not extras:
        return f"imports {root}, and no extra brings {package}"
    if statement.when != "typing" and statement.guard not in extras:
        return f'imports {root} outside of needs("{min(extras)}", ...)'
    return None


def unsaid(files: list[Source], known: Declared) -> list[str]:
    """Find import_module calls without an extra that the file names, and check_extra calls with a wrong package."""
    problems = []
    for file in files:
        calls = list(ast.walk(file.tree))
        named = {words[0] for call in calls if (words := constants(call, "needs", "check_extra"))}
        there = OWN | sys.stdlib_module_names | known.required.union(*(known.extras.get(extra, ()) for extra in named))
        for call in calls:
            for name in constants(call, "import_module")[:1]:
                root = (name or ".").split(".")[0]
                if root and not {root, package_of(root)} & there:
                    problems.append(f"{file.path}:{call.lineno}: imports {root}, whose extra is not said")
            words = constants(call, "check_extra")
            if len(words) > 1 and None not in words[:2] and package_of(words[1]) not in known.extras.get(words[0], ()):
                problems.append(f"{file.path}:{call.lineno}: {words[0]} does not bring {words[1]}")
    return problems


def loads_late(files: list[Source], late: dict[str, str | None]) -> list[str]:
    """Find modules that import a listed one at their head, which would load it for everybody."""
    listed = {path.removesuffix(".py").replace("/", ".") for path in late}
    problems = []
    for file in files:
        for statement in import_statements(file.tree):
            for imported in imports(file, [statement.node]):
                names = {imported.module, f"{imported.module}.{imported.name}", f"{file.folder}.{imported.module}"}
                if statement.when == "head" and file.path not in late and names & listed:
                    problems.append(f"{file.path}:{imported.line}: imports {min(names & listed)} at its head")
    return problems


@pytest.fixture(scope="module")
def known():
    return declared((ROOT / "setup.cfg").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def files():
    return [*read(*FOLDERS), *(file for file in root_modules() if file.path != "setup.py")]


def test_the_imports_of_setup_py_are_declared_for_builds():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    known = Declared({package_of(re.match(r"[\w.-]+", line)[0]) for line in build["requires"]}, {})
    files = [file for file in root_modules() if file.path == "setup.py"]
    assert len(files) == 1
    assert_none(undeclared(files, known, {}))
    assert len(undeclared(files, Declared(set(), {}), {})) == 1  # setuptools, if nothing declared it


def test_every_import_is_declared(files, known):
    assert {"torch", "huggingface-hub", "tokenizers"} <= known.required and "pandas" not in known.required
    assert known.extras["lora"] == {"peft"} and len(files) > 150
    assert_none(undeclared(files, known, LATE))
    assert_none(unsaid(files, known))
    fewer = known._replace(required=known.required - {"tokenizers"})
    assert {problem.split(":")[0] for problem in undeclared(files, fewer, LATE)} == {
        "agents/small_models/tokenizers.py"
    }


def test_listed_modules_exist_and_load_late(files):
    assert set(LATE) <= {file.path for file in files}
    assert_none(loads_late(files, LATE))


# Each rule can fail.

MADE_UP = """
[options]
install_requires =
    numpy
    jsonargparse>=4.53,<5
[options.extras_require]
lora =
    peft>=0.18
# a comment
page =
    starlette>=0.49.1
    Some.Thing; python_version < "3.12"
dev =
    pandas
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import pandas", "agents/a.py:1: imports pandas at its head, and install_requires lacks pandas"),
        ("import os, numpy.random\nfrom jsonargparse import x\nfrom .b import c\nfrom textenv import env", None),
        ("import peft", "agents/a.py:1: imports peft at its head, and install_requires lacks peft"),
        (
            "try:\n    import peft\nexcept ImportError:\n    peft = None",
            "agents/a.py:2: imports peft at its head, and ",
        ),
        ("with needs('lora', 'peft', 'x'):\n    import peft", "agents/a.py:2: imports peft at its head, and "),
        ("class A:\n    import yaml", "agents/a.py:2: imports yaml at its head, and install_requires lacks pyyaml"),
        ("def f():\n    import pandas.core", "agents/a.py:2: imports pandas, and no extra brings pandas"),
        ("def f():\n    import peft", 'agents/a.py:2: imports peft outside of needs("lora", ...)'),
        (
            "def f():\n    with needs('page', 'peft', 'x'):\n        import peft",
            "agents/a.py:3: imports peft outside of ",
        ),
        ("def f():\n    with suppress(E):\n        import peft", "agents/a.py:3: imports peft outside of needs"),
        ("def f():\n    with needs('lora', 'peft', 'x'):\n        from peft import y", None),
        ("async def f():\n    with extras.needs('page', 'some_thing', 'x'):\n        import some_thing.b", None),
        ("if TYPE_CHECKING:\n    from peft import x", None),
        ("if TYPE_CHECKING:\n    from pandas import x", "agents/a.py:2: imports pandas, and no extra brings pandas"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import peft", "agents/a.py:4: imports peft at its head, and "),
        ("from recipe import x", "agents/a.py:1: imports recipe at its head, and "),
    ],
)
def test_undeclared_can_fail(text, message):
    files = [source("agents/a.py", text), source("examples/recipe.py", ""), source("examples/a.py", "import recipe")]
    problems = undeclared(files, declared(MADE_UP), {})
    assert len(problems) == (message is not None) and all(problem.startswith(message) for problem in problems), problems


def test_a_listed_module_imports_its_own_extra_guarded_and_nothing_else():
    text = "with needs('page', 'starlette', 'x'):\n    import starlette\nimport peft\nimport starlette"
    files = [source("agents/page.py", text), source("benchmarks/peer.py", "import trl")]
    assert undeclared(files, declared(MADE_UP), {"agents/page.py": "page", "benchmarks/peer.py": None}) == [
        "agents/page.py:3: imports peft at its head, and install_requires lacks peft",
        'agents/page.py:4: imports starlette outside of needs("page", ...)',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import_module('peft.x')", "agents/a.py:1: imports peft, whose extra is not said"),
        (
            "check_extra('page', 'starlette', 'x')\nimportlib.import_module('peft')",
            "agents/a.py:2: imports peft, whose ",
        ),
        ("check_extra('lora', 'peft', 'x')\nimport_module('peft')\nimport_module('json')\nimport_module(name)", None),
        ("check_extra('lora', 'pandas', 'x')", "agents/a.py:1: lora does not bring pandas"),
        ("check_extra('laro', 'peft', 'x')", "agents/a.py:1: laro does not bring peft"),
        ("check_extra(name, name, 'x')", None),
    ],
)
def test_unsaid_can_fail(text, message):
    problems = unsaid([source("agents/a.py", text)], declared(MADE_UP))
    assert len(problems) == (message is not None) and all(problem.startswith(message) for problem in problems), problems


@pytest.mark.parametrize(
    ("path", "text", "fails"),
    [
        ("textenv/a.py", "from textenv.page import serve", True),
        ("textenv/a.py", "from textenv import page", True),
        ("agents/a.py", "import textenv.page", True),
        ("textenv/a.py", "from .page import serve", True),
        ("benchmarks/a.py", "import peer", True),
        ("textenv/a.py", "def f():\n    from textenv.page import serve", False),
        ("textenv/guard.py", "from textenv.page import serve", False),
        ("textenv/a.py", "from textenv.pages import serve", False),
    ],
)
def test_loads_late_can_fail(path, text, fails):
    late = {"textenv/page.py": "page", "textenv/guard.py": "page", "benchmarks/peer.py": None}
    assert bool(loads_late([source(path, text)], late)) is fails


def test_setup_cfg_is_read_as_pip_reads_it():
    known = declared(MADE_UP)
    assert known.required == {"numpy", "jsonargparse"}
    assert known.extras == {"lora": {"peft"}, "page": {"starlette", "some-thing"}}  # without dev, which is for tests
