"""The pages of the site: their snippets run on tiny models, their imports work, and the generated ones are complete."""

import ast
import importlib.util
from contextlib import suppress
from types import SimpleNamespace

import pytest

import agents
import textenv
from agents.cli.main import VERBS, main
from tests.docs.snippets import run_for_one_rollout, snippets
from tests.helpers.command import ROOT
from textenv.rewards import Length
from textenv.text.named_tokenizer import read_tokenizer

DOCS = ROOT / "docs"
SCALE = {"docs/engines.md", "docs/scaling.md"}  # engines and several processes: run in tests/agents, parsed here
# docs/zh/ has the blocks of the English pages, as test_chinese.py shows.
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in DOCS.rglob("*.md")
    if "```python" in path.read_text(encoding="utf-8") and DOCS / "zh" not in path.parents
)
GROUPS = "docs/losses.md"  # its blocks use a reader's own env and models


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages():
    """Return the module docs/pages.py, which mkdocs loads by its path, too."""
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def readers_own(page):
    """Return the names that a page takes for granted."""
    if page != GROUPS:
        return {}
    tokenizer = read_tokenizer("gpt2")
    rows = [{"prompt": "the film", "answers": ["a"]}]
    env = textenv.TextEnv(rows, tokenizer, reward=Length(4), samples_per_prompt=8, max_new_tokens=8)
    return {"env": env, "tokenizer": tokenizer, "prompts": rows, "lm": "gpt2", "student": "gpt2", "teacher": "gpt2"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sequences in", "ignore:.*fewer than 4")
@pytest.mark.parametrize("page", [page for page in PAGES if page not in SCALE])
def test_the_snippets_of_a_page_run(hub, page):
    run_for_one_rollout(snippets(text_of(page)), page, readers_own(page))


@pytest.mark.parametrize("page", PAGES)
def test_every_import_of_a_page_works(page):
    nodes = [node for block in snippets(text_of(page)) for node in ast.walk(ast.parse(block))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module != "vllm"]
    assert imports or page in SCALE
    for node in imports:
        exec(ast.unparse(node), {})


def test_the_reference_has_every_public_name(pages):
    made = pages.generated_pages()
    for package, names in (("textenv", textenv.__all__), ("agents", agents.__all__)):
        page = made[f"reference/{package}.md"]
        missing = [
            name for name in names if f"::: {package}.{name}\n" not in page and f"## {package}.{name}\n" not in page
        ]
        assert missing in ([], ["__version__"])
    assert all(f"## textenv {verb}\n" in made["reference/command_line.md"] for verb in VERBS)
    assert "switches the penalty off. (a number; default: `0.05`) |\n" in made["reference/configuration.md"]


def test_the_help_on_the_site_is_that_of_the_command(pages, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    page = pages.page_of_commands()
    for verb in ([], *([name] for name in VERBS)):
        with suppress(SystemExit):
            main([*verb, "--help"])
        printed = capsys.readouterr().out.rstrip()
        assert printed.startswith(("textenv", "usage:")) and f"```text\n{printed}\n```" in page, verb


def test_links_of_the_repository_become_links_of_the_site(pages):
    block = "\n```\n[e](../docs/remote.md)\n```\n"  # is code, and stays
    text = "[a](../docs/remote.md#x) [b](configs/README.md) [c](https://a.b/c.md) [d](#here)"
    assert pages.with_links(text + block, "examples/README.md") == text.replace("docs/", "") + block
    moved = pages.with_links("[a](../../examples/masked_json.py)", "guides/masks.md")
    assert moved == "[a](../examples/masked_json.py.md)"
    assert pages.with_links("| `a \\| b` |", "guides/masks.md") == "| `a | b` |"


def test_the_chinese_pages_say_that_they_are_chinese(pages):
    def page(name):
        return SimpleNamespace(file=SimpleNamespace(src_uri=name))

    html = '<html lang="en" class="no-js">'
    assert pages.on_post_page(html, page("zh/index.md"), None) == '<html lang="zh-Hans" class="no-js">'
    assert pages.on_post_page(html, page("index.md"), None) == html


def test_options_are_kept_whole(pages):
    page = "<p><code>train --resume RUN</code> a --b <code>-c</code> <code>a-b x - 1</code></p>"
    assert pages.with_whole_options(page) == (
        '<p><code>train <span class="option">--resume</span> RUN</code> a --b '
        '<code><span class="option">-c</span></code> <code>a-b x - 1</code></p>'
    )


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    spec.loader.exec_module(docstrings := importlib.util.module_from_spec(spec))
    table = "One.\n\n  === ======\n  a   of b\n  === ======\n  1   2 or 3\n  === ======\n\nExample:\n    >>> 1\n    1"
    expected = "One.\n\n  | a | of b |\n  | --- | --- |\n  | 1 | 2 or 3 |\n\nExamples:\n    >>> 1\n    1"
    assert docstrings.with_tables(docstrings.with_examples(table)) == expected
