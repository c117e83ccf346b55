"""The rules of the house: allowed imports, required docstrings, and the largest files, bodies and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.house import (
    FOLDERS,
    LAYERS,
    LIGHT,
    MAX_BODY_LINES,
    MAX_FILE_LINES,
    MAX_FILES_BESIDE_ROOMS,
    MAX_FOLDER_FILES,
    PACKAGES,
    ROOT,
    absolute_imports,
    assert_none,
    crowded_folders,
    files_beside_rooms,
    folders_without_init,
    forbidden_imports,
    import_cycle,
    loaded_by,
    long_bodies,
    long_files,
    missing_docstrings,
    read,
    root_imports,
    root_modules,
    source,
    unlisted_rooms,
    unmirrored_rooms,
    upward_imports,
    wrong_rooms,
)

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


def test_no_import_cycles_across_packages() -> None:
    assert_none(import_cycle([*read(*PACKAGES), *root_modules()]))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_lead_to_lower_layers(package: str) -> None:
    assert_none(upward_imports(read(package), LAYERS[package]))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_is_in_a_layer(package: str) -> None:
    assert_none(wrong_rooms(read(package), LAYERS[package]))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_readme_lists_the_rooms_by_layer(package: str) -> None:
    assert_none(unlisted_rooms(read(package), LAYERS[package], (ROOT / "docs/design.md").read_text(encoding="utf-8")))


def test_every_folder_is_a_package() -> None:
    assert_none(folders_without_init([file.path for file in read(*PACKAGES, "tests")]))


def test_folders_are_not_crowded() -> None:
    assert_none(crowded_folders([file.path for file in read(*FOLDERS)]))


def test_few_files_stand_beside_the_rooms() -> None:
    assert_none(files_beside_rooms(read(*PACKAGES)))


@pytest.mark.parametrize("package", PACKAGES)
def test_tests_lie_where_the_code_does(package: str) -> None:
    assert_none(unmirrored_rooms(read(package), [file.path for file in read("tests")]))


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


# Each rule can fail: a made-up source that breaks it gets the message, one that just keeps it gets none.


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("textenv/a.py", "import numpy\nimport agents.policies", 2),
        ("textenv/a.py", "def f():\n    from agents import LMPolicy", 2),
        ("textenv/a.py", "if TYPE_CHECKING:\n    from agents.policies import KL", 2),
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
    text = "from .files import write_text\nfrom textenv.env import TextEnv\nfrom agents.files import write_text"
    assert absolute_imports([source("agents/a.py", text)]) == ["agents/a.py:3: import agents.files relatively"]


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
    "text",
    [
        "from .b import y",
        "if True:\n    from .b import y",
        "class A:\n    from .b import y",
        "def f():\n    from .b import y",
        "if TYPE_CHECKING:\n    from .b import y",
        "if typing.TYPE_CHECKING:\n    y = 1\nelse:\n    from .b import y",
    ],
)
def test_imports_anywhere_make_a_cycle(text: str) -> None:
    files = [source("agents/a.py", text), source("agents/b.py", "from . import a")]
    assert len(import_cycle(files)) == 2
    assert import_cycle([source("agents/a.py", "y = 1"), files[1]]) == []


MADE_UP = (("errors",), ("models", "data"), ("cli",))


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("agents/cli/a.py", "from ..models.m import x\nfrom ..errors import E\nfrom .b import y", None),
        (
            "agents/models/m.py",
            "import torch\nfrom ..cli.b import y",
            "2: imports agents.cli.b, but cli is not below models",
        ),
        ("agents/models/m.py", "from ..data import d", "1: imports agents.data.d, but data is not below models"),
        ("agents/errors.py", "if TYPE_CHECKING:\n    from .data import d", "2: imports agents.data.d, but data is not"),
        (
            "agents/errors.py",
            "def f():\n    from .cli import b",
            "2: imports agents.cli.b, but cli is not below errors",
        ),
        ("agents/new/n.py", "from ..errors import E", "1: imports agents.errors, but errors is not below new"),
    ],
)
def test_upward_imports_can_fail(path: str, text: str, message: str | None) -> None:
    texts = dict.fromkeys(["agents/errors.py", "agents/models/m.py", "agents/data/d.py", "agents/cli/b.py"], "")
    problems = upward_imports([source(*file) for file in {**texts, path: text}.items()], MADE_UP)
    assert len(problems) == (message is not None)
    assert all(problem.startswith(f"{path}:{message}") for problem in problems)


@pytest.mark.parametrize(
    "text",
    [
        "import_module('.cli.b', __package__)",
        "importlib.import_module('agents.cli.b')",
        "__import__('agents.cli.b')",
        "VERBS = {'b': 'agents.cli.b:run'}",
    ],
)
def test_modules_named_in_strings_are_imports(text: str) -> None:
    files = [source("agents/errors.py", text), source("agents/cli/b.py", "from ..errors import E")]
    assert len(import_cycle(files)) == 2
    assert upward_imports(files, MADE_UP) == ["agents/errors.py:1: imports agents.cli.b, but cli is not below errors"]


def test_a_module_beside_the_packages_can_close_a_cycle() -> None:
    files = [source("agents/__init__.py", "import start"), source("start.py", "def main():\n    import agents")]
    assert len(import_cycle(files)) == 2


def test_wrong_rooms_can_fail() -> None:
    files = [source("agents/errors.py", ""), source("agents/models/m.py", ""), source("agents/new/n.py", "")]
    assert wrong_rooms(files, MADE_UP) == [
        "new: a room in no layer",
        "cli: named in a layer, and not there",
        "data: named in a layer, and not there",
    ]
    assert wrong_rooms(files, (("errors", "models", "new"),)) == []


def test_unlisted_rooms_can_fail() -> None:
    files = [source("agents/errors.py", "'''Errors.'''"), source("agents/cli/__init__.py", "'''Commands.'''")]
    layers = (("errors",), ("cli",))
    table = "| `errors.py` | Errors. |\n| `cli/` | Commands. |\n"
    assert unlisted_rooms(files, layers, table) == []
    assert len(unlisted_rooms(files, layers, table.replace("Commands", "Verbs"))) == 1
    assert len(unlisted_rooms(files, layers[::-1], table)) == 1  # in another order


def test_files_beside_rooms_can_fail() -> None:
    files = [source(f"agents/a{i}.py", "") for i in range(MAX_FILES_BESIDE_ROOMS)]
    assert files_beside_rooms([*files, source("agents/__init__.py", ""), source("agents/cli/a.py", "")]) == []
    assert files_beside_rooms([*files, source("agents/b.py", "")]) == ["agents: 6 files beside the rooms, over 5"]


def test_unmirrored_rooms_can_fail() -> None:
    files = [source("agents/errors.py", ""), source("agents/cli/a.py", ""), source("agents/runs/a.py", "")]
    assert unmirrored_rooms(files, ["tests/agents/cli/test_a.py", "tests/agents/runs/test_a.py", "tests/a.py"]) == []
    assert unmirrored_rooms(files, ["tests/agents/cli/test_a.py", "tests/agents/steps/test_a.py"]) == [
        "agents/runs: a room without tests",
        "tests/agents/steps: tests of no room",
    ]


def test_folders_without_init_can_fail() -> None:
    assert folders_without_init(["agents/__init__.py", "agents/a.py", "agents/runs/b.py"]) == ["agents/runs"]
    assert folders_without_init(["agents/__init__.py", "agents/runs/__init__.py", "agents/runs/b.py"]) == []


def test_crowded_folders_can_fail() -> None:
    full = ["agents/a/__init__.py", *(f"agents/a/m{i}.py" for i in range(MAX_FOLDER_FILES))]
    assert crowded_folders([*full, "agents/b.py", "agents/a/sub/c.py"]) == []
    assert crowded_folders([*full, "agents/a/one_more.py"]) == ["agents/a: 31 files, over 30"]


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
