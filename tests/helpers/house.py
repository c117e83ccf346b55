"""The rules of `tests/test_house.py`: the layers of both packages as data, and one function per rule.

A rule takes source files and returns a list of messages, one for each place that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("textenv", "agents", "examples", "benchmarks", "tests")
PACKAGES = ("textenv", "agents")

MAX_FILE_LINES = 400
MAX_BODY_LINES = 60
MAX_FOLDER_FILES = 30
MAX_FILES_BESIDE_ROOMS = 5

# A class or function by the name of its module, as in "agents.cli.show:show".
ENTRY_POINT = re.compile(r"(?:agents|textenv)(?:\.\w+)+:\w+")

# The rooms of each package, lowest layer first. A room may import itself and the rooms of lower layers, but no other
# room of its own layer. A room is a folder, or a file that stands beside the folders.
LAYERS = {
    "agents": (
        ("errors",),
        ("files", "signals", "configuration"),
        ("small_models", "diagnosis"),
        ("models",),
        ("distributed",),
        ("policies",),
        ("rollout",),
        ("steps",),
        ("engines", "checkpoints", "doctor", "recipe_parts"),
        ("evaluation", "supervised", "build"),
        ("callbacks", "zoo"),
        ("runs",),
        ("report",),
        ("cli",),
        ("__init__",),
    ),
    "textenv": (
        ("checks",),
        ("huggingface",),
        ("text",),
        ("prompts",),
        ("episodes",),
        ("masks", "feedback"),
        ("rewards",),
        ("metrics", "lanes"),
        ("env",),
        ("vector", "tasks", "adapters"),
        ("testing",),
        ("__init__",),
    ),
}

# The packages that `import textenv` may load: the two libraries, and what gymnasium itself requires.
LIGHT = {"gymnasium", "numpy", "cloudpickle", "farama_notifications", "typing_extensions"}

Layers = tuple[tuple[str, ...], ...]


class Source(NamedTuple):
    """One file: its path from the root of the repository, its text and its syntax tree."""

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
    def room(self) -> str:
        """The room that the file belongs to: a folder of its package, or the file itself."""
        return self.path.split("/")[1].removesuffix(".py")

    @property
    def package(self) -> str:
        """The package from which `from . import` of this file imports."""
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


@cache
def root_modules() -> list[Source]:
    """Read the modules that stand beside the packages, such as the start of the command."""
    return [source(file.name, file.read_text(encoding="utf-8")) for file in sorted(ROOT.glob("*.py"))]


def imports(file: Source, nodes: Iterable[ast.AST] | None = None) -> list[Import]:
    """List the imports of a file or of some nodes of its tree, those in functions and under TYPE_CHECKING included.

    Relative imports are made absolute.
    """
    statements = []
    for node in ast.walk(file.tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            statements += [Import(node.lineno, alias.name, None, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = file.package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []  # `from .. import` drops one name
            module = ".".join([*base, *([node.module] if node.module else [])])
            statements += [Import(node.lineno, module, alias.name, node.level > 0) for alias in node.names]
    return statements


def forbidden_imports(files: list[Source], forbidden: set[str]) -> list[str]:
    return [
        f"{file.path}:{statement.line}: {file.folder}/ must not import {statement.module}"
        for file in files
        for statement in imports(file)
        if statement.module.split(".")[0] in forbidden
    ]


def root_imports(files: list[Source]) -> list[str]:
    """Find the imports of a package's own root by a file of the package other than the root itself."""
    problems = []
    for file in files:
        for statement in imports(file):
            # `import textenv.env` binds the root as well
            binds = statement.name is None and statement.module.split(".")[0] == file.folder
            if binds or (statement.module == file.folder and file.module != file.folder):
                problems.append(f"{file.path}:{statement.line}: imports its own package's root, {file.folder}")
    return problems


def absolute_imports(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{statement.line}: import {statement.module} relatively"
        for file in files
        for statement in imports(file)
        if statement.module.split(".")[0] == file.folder and not statement.relative
    ]


def named_modules(file: Source) -> list[Import]:
    """List the modules that a file names in strings: as "module:name", or as an argument of `import_module`."""
    names = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ENTRY_POINT.fullmatch(node.value):
            names.append(Import(node.lineno, node.value.split(":")[0], None, False))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    level = len(argument.value) - len(argument.value.lstrip("."))
                    base = file.package.split(".")
                    base = base[: len(base) - level + 1] if level else []
                    module = ".".join([*base, argument.value.lstrip(".")])
                    names.append(Import(node.lineno, module, None, level > 0))
    return names


def arrows(files: list[Source]) -> Iterator[tuple[Source, Source, str]]:
    """Yield each import of one file by another: the importer, the imported file, and the start of a message."""
    by_module = {file.module: file for file in files}
    for file in files:
        for statement in [*imports(file), *named_modules(file)]:
            submodule = f"{statement.module}.{statement.name}"
            target = by_module.get(submodule) or by_module.get(statement.module)
            if target is not None and target is not file:
                yield file, target, f"{file.path}:{statement.line}: imports {target.module}"


def import_cycle(files: list[Source]) -> list[str]:
    """Find one cycle among all imports of the files: one message for each of its edges."""
    edges: dict[str, dict[str, str]] = {file.module: {} for file in files}
    for file, target, message in arrows(files):
        edges[file.module].setdefault(target.module, f"{message}, closing a cycle")
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        nodes = error.args[1]  # each is a predecessor of the next, and the first is repeated at the end
        return [edges[after][before] for before, after in itertools.pairwise(nodes)]
    return []


def upward_imports(files: list[Source], layers: Layers) -> list[str]:
    """Find the imports of a package that lead to a room of the same or a higher layer."""
    level = {room: number for number, rooms in enumerate(layers) for room in rooms}
    return [
        f"{message}, but {target.room} is not below {file.room}"
        for file, target, message in arrows(files)
        if file.room != target.room and level.get(target.room, len(layers)) >= level.get(file.room, -1)
    ]


def wrong_rooms(files: list[Source], layers: Layers) -> list[str]:
    """Find the rooms of a package that are in no layer, and the names in layers that are no rooms."""
    named, existing = {room for rooms in layers for room in rooms}, {file.room for file in files}
    return [f"{room}: a room in no layer" for room in sorted(existing - named)] + [
        f"{room}: named in a layer, and not there" for room in sorted(named - existing)
    ]


def unlisted_rooms(files: list[Source], layers: Layers, page: str) -> list[str]:
    """Find the rooms whose line (name, first sentence) is missing on the page, or is not in the order of layers."""
    by_module = {file.module: file for file in files}
    problems, position = [], 0
    for room in (room for rooms in layers for room in rooms if room != "__init__"):
        file = by_module[f"{files[0].folder}.{room}"]
        name = f"{room}/" if file.path.endswith("__init__.py") else f"{room}.py"
        line = f"| `{name}` | {(ast.get_docstring(file.tree) or '').partition(chr(10))[0]} |"
        start = page.find(line, position)
        if start < 0:
            problems.append(f"{file.path}: not in the table of docs/design.md, or not in its place: {line}")
        position = max(position, start)
    return problems


def files_beside_rooms(files: list[Source]) -> list[str]:
    """Find the package whose root has more files than the limit, `__init__.py` left out."""
    counts = Counter(file.folder for file in files if file.path.count("/") == 1 and file.room != "__init__")
    limit = MAX_FILES_BESIDE_ROOMS
    return [f"{folder}: {n} files beside the rooms, over {limit}" for folder, n in counts.items() if n > limit]


def unmirrored_rooms(files: list[Source], tests: list[str]) -> list[str]:
    """Find the rooms of a package without a folder of tests, and the folders of tests without a room.

    Args:
        files: The files of the package.
        tests: The paths of the test files.
    """
    package = files[0].folder
    rooms = {file.room for file in files if file.path.count("/") > 1}
    folders = {path.split("/")[2] for path in tests if path.startswith(f"tests/{package}/") and path.count("/") > 2}
    return [f"{package}/{room}: a room without tests" for room in sorted(rooms - folders)] + [
        f"tests/{package}/{folder}: tests of no room" for folder in sorted(folders - rooms)
    ]


def folders_without_init(paths: list[str]) -> list[str]:
    """Find the folders with modules that are no packages: a wheel would leave them out."""
    folders = {path.rpartition("/")[0] for path in paths}
    return sorted(folder for folder in folders if f"{folder}/__init__.py" not in paths)


def crowded_folders(paths: list[str]) -> list[str]:
    """Find the folders that hold more files than the limit; each `__init__.py` is left out."""
    counts = Counter(path.rpartition("/")[0] for path in paths if not path.endswith("/__init__.py"))
    return [
        f"{folder}: {n} files, over {MAX_FOLDER_FILES}" for folder, n in sorted(counts.items()) if n > MAX_FOLDER_FILES
    ]


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
        # Entries without a spec are put there by compiled extensions, not by an import statement.
        "print(*{name.split('.')[0] for name in set(sys.modules) - before if vars(sys.modules[name]).get('__spec__')})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"`import {module}` failed:\n{run.stderr}"
    return set(run.stdout.split()) - set(sys.stdlib_module_names) - {module}


def assert_none(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
