"""The rules of the house: who may import whom, what carries a docstring, how long things get.

Each rule is a function from source files to a list of messages, tried below on a made-up source that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("textenv", "agents", "examples", "benchmarks", "tests")
PACKAGES = ("textenv", "agents")

MAX_FILE_LINES = 400
MAX_BODY_LINES = 60

# What `import textenv` may bring along: the two libraries, and what gymnasium itself requires.
LIGHT = {"gymnasium", "numpy", "cloudpickle", "farama_notifications", "typing_extensions"}


class Source(NamedTuple):
    """One file: its path below the root of the repository, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def module(self) -> str:
        name = self.path.removesuffix(".py").replace("/", ".")
        return name.removesuffix(".__init__")

    @property
    def package(self) -> str:
        """What a relative import of level one is relative to."""
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]


class Import(NamedTuple):
    """One imported name: the absolute module, the name taken from it (if any), and how it was written."""

    line: int
    module: str
    name: str | None
    relative: bool


@cache
def source(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text, path))


@cache
def read(*folders: str) -> list[Source]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def walk_at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the statements that run when a module is imported: no function bodies, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and is_type_checking(child):
            for statement in child.orelse:
                yield statement
                yield from walk_at_import_time(statement)
            continue
        yield child
        yield from walk_at_import_time(child)


def imports(file: Source, nodes: Iterator[ast.AST] | None = None) -> list[Import]:
    """List the imports among the nodes (the whole file by default), with relative ones made absolute."""
    found = []
    for node in nodes or ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, None, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = file.package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [Import(node.lineno, module, alias.name, node.level > 0) for alias in node.names]
    return found


def forbidden_imports(files: list[Source], forbidden: set[str]) -> list[str]:
    return [
        f"{file.path}:{found.line}: {file.folder}/ must not import {found.module}"
        for file in files
        for found in imports(file)
        if found.module.split(".")[0] in forbidden
    ]


def root_imports(files: list[Source]) -> list[str]:
    """Find the imports of a package's own root from within it; the root, and what it loads late, may name modules."""
    problems = []
    for file in files:
        for found in imports(file):
            # `import textenv.env` binds the root as well
            binds = found.name is None and found.module.split(".")[0] == file.folder
            if binds or (found.module == file.folder and file.module not in (file.folder, f"{file.folder}.public")):
                problems.append(f"{file.path}:{found.line}: imports its own package's root, {file.folder}")
    return problems


def absolute_imports(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{found.line}: import {found.module} relatively"
        for file in files
        for found in imports(file)
        if found.module.split(".")[0] == file.folder and not found.relative
    ]


def import_cycle(files: list[Source]) -> list[str]:
    """Find one cycle among the imports that run at import time: one message for each of its edges."""
    modules = {file.module for file in files}
    edges: dict[str, dict[str, str]] = {}
    for file in files:
        edges[file.module] = {}
        for found in imports(file, walk_at_import_time(file.tree)):
            submodule = f"{found.module}.{found.name}"
            target = submodule if submodule in modules else found.module
            if target in modules:
                edges[file.module].setdefault(target, f"{file.path}:{found.line}: imports {target}, closing a cycle")
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        nodes = error.args[1]  # each is a predecessor of the next, and the first is repeated at the end
        return [edges[after][before] for before, after in itertools.pairwise(nodes)]
    return []


def missing_docstrings(files: list[Source]) -> list[str]:
    problems = []
    for file in files:
        if not ast.get_docstring(file.tree):
            problems.append(f"{file.path}:1: module without a docstring")
        for node in file.tree.body:
            named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                problems.append(f"{file.path}:{node.lineno}: {node.name} without a docstring")
    return problems


def long_files(files: list[Source]) -> list[str]:
    counts = [(file, len(file.text.splitlines())) for file in files]
    return [f"{file.path}:{n}: file of {n} lines, over {MAX_FILE_LINES}" for file, n in counts if n > MAX_FILE_LINES]


def long_bodies(files: list[Source]) -> list[str]:
    """Find function bodies over the limit, counted from the first line after the docstring to the last."""
    problems = []
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if lines > MAX_BODY_LINES:
                    problems.append(f"{file.path}:{node.lineno}: {node.name} has {lines} lines, over {MAX_BODY_LINES}")
    return problems


def loaded_by(module: str, root: Path) -> set[str]:
    """Name the top-level packages outside the standard library that a fresh interpreter loads for the module."""
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); before = set(sys.modules); import {module}; "
        # without a spec: entries that compiled extensions put there, which no import statement names
        "print(*{name.split('.')[0] for name in set(sys.modules) - before if vars(sys.modules[name]).get('__spec__')})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"`import {module}` failed:\n{run.stderr}"
    return set(run.stdout.split()) - set(sys.stdlib_module_names) - {module}


def assert_none(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


# The project keeps the rules.


def test_the_packages_are_read() -> None:
    paths = {file.path for file in read(*FOLDERS)}
    assert {"textenv/__init__.py", "agents/__init__.py", "tests/test_house.py"} <= paths


def test_textenv_imports_nothing_above_it() -> None:
    heavy = {"agents", "examples", "benchmarks", "tests"}
    assert_none(forbidden_imports(read("textenv"), heavy))


def test_import_textenv_is_light() -> None:
    extra = loaded_by("textenv", ROOT) - LIGHT
    assert not extra, f"`import textenv` loads {sorted(extra)}, only gymnasium and numpy are allowed"


def test_agents_imports_nothing_above_it() -> None:
    assert_none(forbidden_imports(read("agents"), {"examples", "benchmarks", "tests"}))


def test_nothing_imports_tests_or_examples() -> None:
    assert_none(forbidden_imports(read("examples", "benchmarks"), {"tests", "examples"}))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_cycles(package: str) -> None:
    assert_none(import_cycle(read(package)))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_its_own_root(package: str) -> None:
    assert_none(root_imports(read(package)))


def test_imports_within_agents_are_relative() -> None:
    assert_none(absolute_imports(read("agents")))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_things_have_docstrings(package: str) -> None:
    assert_none(missing_docstrings(read(package)))


def test_files_are_short() -> None:
    assert_none(long_files(read(*FOLDERS)))


def test_function_bodies_are_short() -> None:
    assert_none(long_bodies(read(*FOLDERS)))


# Each rule can fail: what it says of a source that breaks it, and of one that just keeps it.


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("textenv/a.py", "import numpy\nimport agents.policies", 2),
        ("textenv/a.py", "def f():\n    from agents import LMPolicy", 2),
        ("textenv/a.py", "if TYPE_CHECKING:\n    from agents.kl import KL", 2),
        ("textenv/rewards/a.py", "import os, agents", 1),
        ("textenv/a.py", "import numpy\nfrom . import agents\nimport agents_of_change", None),
    ],
)
def test_forbidden_imports_can_fail(path: str, text: str, line: int | None) -> None:
    problems = forbidden_imports([source(path, text)], {"agents"})
    assert [problem.split(" ")[0] for problem in problems] == ([f"{path}:{line}:"] if line else [])


@pytest.mark.parametrize(
    ("path", "text", "fails"),
    [
        ("textenv/a.py", "import textenv", True),
        ("textenv/a.py", "import textenv.env", True),
        ("textenv/a.py", "from textenv import TextEnv", True),
        ("textenv/a.py", "from . import env", True),
        ("textenv/rewards/a.py", "def f():\n    from .. import env", True),
        ("textenv/rewards/__init__.py", "from .. import env", True),
        ("textenv/__init__.py", "import textenv.env", True),
        ("textenv/__init__.py", "from . import env", False),
        ("textenv/a.py", "from .env import TextEnv\nfrom textenv.env import TextEnv", False),
        ("textenv/rewards/a.py", "from . import base\nfrom ..env import TextEnv", False),
        ("agents/a.py", "from textenv import TextEnv\nimport textenv", False),
    ],
)
def test_root_imports_can_fail(path: str, text: str, fails: bool) -> None:
    assert bool(root_imports([source(path, text)])) is fails


def test_absolute_imports_can_fail() -> None:
    text = "from .cache import PrefixCache\nfrom textenv.env import TextEnv\nfrom agents.cache import PrefixCache"
    assert absolute_imports([source("agents/a.py", text)]) == ["agents/a.py:3: import agents.cache relatively"]


def test_import_cycle_can_fail() -> None:
    files = [
        source("agents/__init__.py", "from .a import x"),
        source("agents/a.py", "import os\nfrom .b import y"),
        source("agents/b.py", "try:\n    from .sub import c\nexcept ImportError:\n    raise"),
        source("agents/sub/__init__.py", ""),
        source("agents/sub/c.py", "import agents.a"),
    ]
    assert sorted(import_cycle(files)) == [
        "agents/a.py:2: imports agents.b, closing a cycle",
        "agents/b.py:2: imports agents.sub.c, closing a cycle",
        "agents/sub/c.py:1: imports agents.a, closing a cycle",
    ]
    assert import_cycle(files[:4]) == []


@pytest.mark.parametrize(
    ("text", "cycle"),
    [
        ("from .b import y", True),
        ("if True:\n    from .b import y", True),
        ("class A:\n    from .b import y", True),
        ("def f():\n    from .b import y", False),
        ("if TYPE_CHECKING:\n    from .b import y", False),
        ("if typing.TYPE_CHECKING:\n    y = 1\nelse:\n    from .b import y", True),
    ],
)
def test_only_imports_at_import_time_make_a_cycle(text: str, cycle: bool) -> None:
    assert bool(import_cycle([source("agents/a.py", text), source("agents/b.py", "from . import a")])) is cycle


def test_missing_docstrings_can_fail() -> None:
    bare = "class A:\n    def method(self): ...\n\ndef f(): ...\n\ndef _private(): ..."
    assert missing_docstrings([source("agents/a.py", bare)]) == [
        "agents/a.py:1: module without a docstring",
        "agents/a.py:1: A without a docstring",
        "agents/a.py:4: f without a docstring",
    ]
    assert missing_docstrings([source("agents/a.py", "'''One.'''\nclass A:\n    '''Two.'''")]) == []


def test_long_files_can_fail() -> None:
    fits = "x = 1\n" * MAX_FILE_LINES
    assert long_files([source("agents/a.py", fits)]) == []
    assert long_files([source("agents/a.py", fits + "x")]) == ["agents/a.py:401: file of 401 lines, over 400"]


def test_long_bodies_can_fail() -> None:
    def text(lines: int) -> str:
        return "class A:\n    def f(self):\n        '''One.\n\n        Two.\n        '''\n" + "        x = 1\n" * lines

    assert long_bodies([source("agents/a.py", text(MAX_BODY_LINES))]) == []
    assert long_bodies([source("agents/a.py", text(MAX_BODY_LINES + 1))]) == ["agents/a.py:2: f has 61 lines, over 60"]


def test_loaded_by_can_fail(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import json\nimport pytest\n")
    assert "pytest" in loaded_by("heavy", tmp_path)
    (tmp_path / "light.py").write_text("import json\nimport gymnasium\nimport numpy.random\n")
    assert loaded_by("light", tmp_path) <= LIGHT
