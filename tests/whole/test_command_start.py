"""The start of the command: it uses textenv's own package `agents`, or names the other package of that name."""

import configparser
import os
import subprocess
import sys

import pytest

import textenv_agents
import textenv_command
from agents.errors import Exit
from tests.helpers.house import ROOT

ALIEN = "raise RuntimeError('the other package was imported')\n"


@pytest.fixture
def site(tmp_path):
    """Make a folder of installed packages with a stand-in that has the layout of openai-agents."""
    folder = tmp_path / "site"
    (folder / "agents" / "memory").mkdir(parents=True)
    (folder / "agents" / "__init__.py").write_text(ALIEN)
    (folder / "agents" / "memory" / "__init__.py").write_text(ALIEN)
    info = folder / "openai_agents-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 1.0.0\n")
    (info / "RECORD").write_text("agents/__init__.py,sha256=x,1\nagents/memory/__init__.py,sha256=x,1\n")
    return folder


def python(*words, path, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    process = subprocess.run([sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize("order", ["the other's first", "ours first"])
def test_another_package_of_that_name_is_refused_with_the_cure(order, site, tmp_path):
    path = [site, ROOT] if order == "the other's first" else [ROOT, site]
    code, out, err = python("-m", "textenv_command", "--help", path=path, cwd=tmp_path)
    assert (code, out) == (Exit.MISSING, "")
    assert err == (
        "textenv: Expected the package `agents` to be textenv's alone, got one of openai-agents besides, and they "
        "overwrite each other: install textenv into an environment of its own (python3 -m venv DIR).\n"
    )


def test_a_folder_of_that_name_which_is_found_first_is_refused(site, tmp_path):
    (site / "openai_agents-1.0.0.dist-info" / "RECORD").write_text("subagents/__init__.py,,\nopenai/agents/a.py,,\n")
    code, out, err = python("-m", "textenv_command", "--help", path=[site, ROOT], cwd=tmp_path)
    assert (code, out) == (Exit.MISSING, "")
    assert err.startswith(f"textenv: Expected the package `agents` to be textenv's, {ROOT / 'agents'}, got ")
    assert f"got {(site / 'agents').resolve()}: install textenv into an environment of its own" in err
    # Found after ours, and not listed in the other package's RECORD, the folder does no harm.
    code, out, err = python("-m", "textenv_command", "--help", path=[ROOT, site], cwd=tmp_path)
    assert (code, err) == (Exit.DONE, "") and out.startswith("usage: textenv VERB")


def test_python_raises_the_same_error_where_a_name_of_agents_is_used(site, tmp_path):
    code = "import textenv, agents.cli\ntry: agents.LMPolicy\nexcept ImportError as error: print(error)"
    status, out, err = python("-c", code, path=[ROOT, site], cwd=tmp_path)
    assert status == 0 and out.startswith("Expected the package `agents` to be textenv's alone, got one of openai-"), (
        err
    )


def test_ours_alone_passes_and_a_missing_agents_is_reported(monkeypatch):
    textenv_agents.check_agents()
    monkeypatch.setattr(textenv_agents, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="Expected the package `textenv` to be installed, got none"):
        textenv_agents.check_agents()


def test_the_module_answers_as_the_command_does(tmp_path):
    started = [
        python("-m", module, "--help", path=[ROOT], cwd=tmp_path) for module in ("textenv_command", "agents.cli")
    ]
    assert started[0] == started[1] and started[0][0] == Exit.DONE


def test_setup_cfg_installs_this_command():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["options.entry_points"]["console_scripts"].strip() == "textenv = textenv_command:main"
    assert config["options"]["py_modules"].split() == ["textenv_agents", "textenv_command"]
    assert textenv_command.MISSING == Exit.MISSING
