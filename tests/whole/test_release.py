"""What a release is made of: its version, the files around the code, and the workflows."""

import configparser
import re
import runpy

import pytest
import setuptools
import yaml

import textenv
from tests.helpers.house import ROOT
from tests.whole.test_constraints import pins

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def metadata():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["metadata"]


def newest_release():
    """Return version and date of the newest heading of the changelog; the date is "unreleased" while it is written."""
    return re.search(r"^## \[(\d[^]]*)\] - (\S+)$", text("CHANGELOG.md"), flags=re.MULTILINE).groups()


def test_the_version_is_the_same_everywhere():
    versions = {textenv.__version__, metadata()["version"], read("CITATION.cff")["version"], newest_release()[0]}
    assert len(versions) == 1, versions


def test_the_date_is_the_same_everywhere():
    date = read("CITATION.cff").get("date-released", "unreleased")
    assert str(date) == newest_release()[1]


def test_a_tag_of_another_version_is_not_published():
    build = read(".github/workflows/publish.yml")["jobs"]["build"]["steps"]
    commands = [step.get("run", "") for step in build]
    check = f'test -f "dist/{metadata()["name"]}-${{GITHUB_REF_NAME#v}}.tar.gz"'
    assert commands.index("python -m build") < commands.index(check)


def test_the_notes_of_a_release_come_first_and_are_short():
    _, *releases = re.split(r"^## \[\d[^]]*\] - \d{4}-\d\d-\d\d\n", text("CHANGELOG.md"), flags=re.MULTILINE)
    notes, _, lists = releases[0].partition("\n### ")
    assert 5 < len(notes.strip().splitlines()) <= 25 and lists


def described(monkeypatch, files):
    """Return what setup.py tells PyPI, with the address of the repository's files in its environment."""
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **words: told.update(words))
    monkeypatch.setenv("FILES_URL", files)
    runpy.run_path(str(ROOT / "setup.py"))
    return told["long_description"]


def code_of(page):
    return re.findall(r"^```.*?^```$", page, flags=re.DOTALL | re.MULTILINE)


TARGET = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("files", ["", "https://host.example/us/textenv/blob/v9"])
def test_the_description_on_pypi_has_no_relative_link(files, monkeypatch):
    readme, page = text("README.md"), described(monkeypatch, files)
    assert [link for _, link in TARGET.findall(page) if not link.startswith("https://")] == []
    assert code_of(page) == code_of(readme) != []
    for picture, link in TARGET.findall(readme):
        if not link.startswith("https://"):
            assert (ROOT / link).is_file()
            where = f"({files}/{link}{'?raw=true' if picture else ''})" if files else f"`{link}`"
            assert (where in page) != (bool(picture) and not files)


def test_the_published_description_links_to_the_files_of_its_tag():
    build = next(step for step in steps(read(".github/workflows/publish.yml")) if step.get("run") == "python -m build")
    where = "${{ github.server_url }}/${{ github.repository }}/blob/${{ github.ref_name }}"
    assert build["env"] == {"FILES_URL": where}


def test_the_licence_is_the_same_everywhere():
    assert text("LICENSE").startswith("MIT License")
    assert metadata()["license"] == read("CITATION.cff")["license"] == "MIT"


def hooks():
    repos = read(".pre-commit-config.yaml")["repos"]
    return {hook["id"]: (repo.get("rev"), hook) for repo in repos for hook in repo["hooks"]}


def test_the_hooks_have_the_versions_of_the_constraints():
    ruff = f"v{pins('constraints.txt')['ruff']}"
    assert hooks()["ruff-check"][0] == hooks()["ruff-format"][0] == ruff


def test_the_hooks_check_what_ci_checks():
    rev, mypy = hooks()["mypy"]
    assert rev is None and mypy["language"] == "system"  # the environment's own, which constraints.txt pins
    assert f"step developer {mypy['entry']}\n" in text(".ci/run")


def test_the_hooks_are_described_in_contributing():
    assert "pre-commit install" in text("CONTRIBUTING.md")


def test_all_workflows_use_an_action_in_one_version():
    used = {step["uses"] for path in WORKFLOWS for step in steps(read(path)) if "uses" in step}
    names = [name.partition("@")[0] for name in used]
    assert len(names) == len(set(names)) > 3, used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_write_nothing_but_what_its_job_is_for(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_only_the_upload_gets_an_identity_and_it_runs_nothing_of_ours():
    publish = read(".github/workflows/publish.yml")
    assert {job.get("permissions", {}).get("id-token") for job in publish["jobs"].values()} == {None, "write"}
    upload = publish["jobs"]["upload"]
    assert upload["permissions"] == {"id-token": "write"} and upload["needs"] == "build"
    assert not any("run" in step or ("with" in step and "password" in step["with"]) for step in upload["steps"])
    assert publish[True] == {"release": {"types": ["published"]}}  # YAML reads the key `on` as true


def test_the_upload_is_checked_as_ci_checks_it():
    commands = [step["run"] for step in steps(read(".github/workflows/publish.yml")) if "run" in step]
    assert "twine check --strict dist/*" in commands
    assert 'twine check --strict "$work"/dist/*' in text(".ci/run")


def test_the_published_site_knows_its_address():
    build = next(step for step in steps(read(".github/workflows/docs.yml")) if "mkdocs build" in step.get("run", ""))
    assert build["env"] == {"SITE_URL": "${{ steps.pages.outputs.base_url }}"}
    assert "site_url: !ENV [SITE_URL," in text("mkdocs.yml")


@pytest.mark.parametrize("name", ["bug.yml", "wish.yml"])
def test_an_issue_form_is_complete(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 1
    assert all(field["attributes"]["label"] for field in fields)


def test_it_is_said_how_to_report_a_hole():
    assert "private security advisory" in text("SECURITY.md").partition("## How to report")[2]
    assert "SECURITY.md" in text(".github/ISSUE_TEMPLATE/bug.yml")
