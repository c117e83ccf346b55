"""The pages of the site that are not written in docs/: those of other folders, and those made from the code.

mkdocs calls the three functions at the end, which mkdocs.yml names under `hooks`. Nothing else here depends on mkdocs,
so that another generator can take the same pages.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import posixpath
import re
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from agents import MODULES, NAMES
from agents.cli.main import VERBS, main
from agents.configuration.config import TrainConfig, argument_help
from agents.configuration.values import in_words

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = (
    "examples/*.md",
    "examples/configs/*.md",
    "benchmarks/*.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
PICTURES = ("examples/*.png", "benchmarks/*.png")
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"(?<!`)`[^`\n]+`(?!`)")
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w.-]*")
FIGURE = re.compile(r"^!\[([^\]]*)\]\((figures/\w+\.svg)\)$", flags=re.MULTILINE)
LANGUAGES = {".py": "python", ".yml": "yaml"}
# The rooms of textenv from which users import, beside the package itself; tests/agents/test_public_names.py has them.
ROOMS = ("rewards", "metrics", "adapters", "tasks", "feedback")


# Pages of other folders, and links


@cache
def pages_elsewhere() -> dict[str, str]:
    """Return the pages outside docs/, and a page for each other text file to which a page links: contents by name."""
    written = {path.relative_to(ROOT).as_posix(): path for pattern in ELSEWHERE for path in sorted(ROOT.glob(pattern))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in written.items()}
    here = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")}
    shown = {}
    for name, text in {**texts, **here}.items():
        for link, _ in LINK.findall(text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
            path = ROOT / target
            if path.suffix in LANGUAGES and path.is_file():
                source = path.read_text(encoding="utf-8").rstrip()
                shown[f"{target}.md"] = f"# {path.name}\n\n`{target}`\n\n````{LANGUAGES[path.suffix]}\n{source}\n````\n"
    return {**texts, **shown}


def pictures_elsewhere() -> list[str]:
    """Return the pictures that pages outside docs/ show, from the root of the repository."""
    return [path.relative_to(ROOT).as_posix() for pattern in PICTURES for path in sorted(ROOT.glob(pattern))]


def site_name(target: str) -> str:
    """Return the name that a file of the repository has on the site; a file that is not there keeps its name."""
    name = target.removeprefix("docs/")
    return f"{name}.md" if f"{name}.md" in pages_elsewhere() else name


def with_links(text: str, name: str) -> str:
    """Return a page's text with the links that it has on the site.

    Args:
        text: The page as it stands in the repository.
        name: The page's name on the site.
    """
    folder = posixpath.dirname(name)
    origin = folder if name in pages_elsewhere() else posixpath.join("docs", folder)

    def moved(link: re.Match[str]) -> str:
        target = site_name(posixpath.normpath(posixpath.join(origin, link[1])))
        return posixpath.relpath(target, folder or ".") + (link[2] or "")

    text = CODE.sub(lambda span: span[0].replace("\\|", "|"), text)  # GitHub's tables need the backslash, ours show it
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)  # blocks of code at odd places
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def with_figures(text: str) -> str:
    """Return a page's text with its drawings inside, so that they take the colours of the page, light or dark."""

    def drawn(figure: re.Match[str]) -> str:
        drawing = (ROOT / "docs" / figure[2]).read_text(encoding="utf-8").strip()
        return f'<figure class="drawing" role="img" aria-label="{figure[1]}">\n{drawing}\n</figure>'

    return FIGURE.sub(drawn, text)


def with_whole_options(page: str) -> str:
    """Return a page's HTML with options such as `--out` kept whole: a browser breaks lines after each hyphen."""

    def marked(code: re.Match[str]) -> str:
        return OPTION.sub(r'<span class="option">\g<0></span>', code[0])

    return re.sub(r"(?<=<code>)[^<]*(?=</code>)", marked, page)


# Pages made from the code


def first_line(module: str) -> str:
    """Return the first line of a module's docstring, without importing it."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or "").partition("\n")[0]


def public_names(module: str) -> list[str]:
    """Return the public names of a module in their order: those of `__all__`, or all that it defines."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    defined = []
    for node in tree.body:
        names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "__all__":
                return [str(name) for name in ast.literal_eval(node.value)]
            names = [node.targets[0].id] if is_described(tree.body, node) else []
        defined += [name for name in names if not name.startswith("_")]
    return defined


def is_described(body: list[ast.stmt], node: ast.stmt) -> bool:
    """Return whether a docstring follows a constant."""
    after = body[body.index(node) + 1 :][:1]
    return bool(after) and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant)


def entries(names: list[str], level: int = 2) -> str:
    """Return the lines by which mkdocstrings writes each name's entry."""
    options = f"    options:\n      heading_level: {level}\n"
    return "\n".join(f"::: {name}\n{options}" for name in names)


def page_of_textenv() -> str:
    """Return the page of the names in `textenv`."""
    names = [name for name in public_names("textenv") if name not in ("__version__", "demo")]
    demo = "\n## textenv.demo\n\n" + first_line("textenv.text.demo_corpus") + "\n\n"
    corpus = entries([f"textenv.text.demo_corpus.{name}" for name in public_names("textenv.text.demo_corpus")], 3)
    return f"# textenv\n\n{first_line('textenv')}\n\n" + entries([f"textenv.{name}" for name in names]) + demo + corpus


def page_of_room(room: str) -> str:
    """Return the page of a room of `textenv`: what the room exports, then the modules that are imported by name."""
    package = f"textenv.{room}"
    folder = ROOT / "textenv" / room
    own = public_names(package)
    text = f"# {package}\n\n{first_line(package)}\n\n" + entries([f"{package}.{name}" for name in own])
    for path in sorted(folder.glob("[a-z]*.py")):
        module = f"{package}.{path.stem}"
        names = [name for name in public_names(module) if name not in own]
        if names:
            text += f"\n## {module}\n\n{first_line(module)}\n\n" + entries([f"{module}.{name}" for name in names], 3)
    return text


def page_of_agents() -> str:
    """Return the page of the names in `agents`, under the first lines of the rooms that define them."""
    rooms: dict[str, list[str]] = {}
    for name, module in NAMES.items():
        rooms.setdefault(module.split(".")[1], []).append(name)
    text = f"# agents\n\n{first_line('agents')}\n\n"
    for room, names in sorted(rooms.items()):
        text += f"## {room.replace('_', ' ').capitalize()}\n\n{first_line(f'agents.{room}')}\n\n"
        text += entries([f"agents.{name}" for name in names], 3) + "\n"
    for name, module in MODULES.items():
        full = f"agents{module}"
        text += f"## agents.{name}\n\n{first_line(full)}\n\n"
        text += entries([f"{full}.{function}" for function in public_names(full)], 3) + "\n"
    return text


def page_of_keys() -> str:
    """Return the page of the keys of a configuration, from the dataclasses that define them."""
    text = (
        "# Configuration keys\n\nA configuration is a YAML file; on the command line a key is an option, "
        "`--algorithm.n_envs 32`. `textenv train --print_config` prints all keys with their values, `textenv tasks` "
        "the names of tasks, rewards, metrics, masks and loggers. The keys of `textenv tune` are in "
        "[its page](../tuning.md).\n\n"
    )
    hints = get_type_hints(TrainConfig)
    nested = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    text += "## At the top\n\n" + table_of_keys(TrainConfig, "", set(nested))
    for name, kind in nested.items():
        first = (kind.__doc__ or "").partition("\n")[0]
        text += f"\n## {name}\n\n{first}\n\n" + table_of_keys(kind, f"{name}.", set())
    return text


def table_of_keys(config: type, prefix: str, left_out: set[str]) -> str:
    """Return the table of one dataclass: keys, and their meaning, type and default as `--help` has them."""
    texts, hints, rows = argument_help(config), get_type_hints(config), []
    for field in fields(config):
        if field.name not in left_out:
            kind = f"{in_words(hints[field.name])}; default: `{default_of(field)}`"
            rows.append(f"| `{prefix}{field.name}` | {escaped(texts[field.name])} ({kind}) |")
    return "\n".join(["| key | meaning |", "|---|---|", *rows]) + "\n"


def default_of(field: Any) -> str:
    """Return the default of a dataclass's field as YAML writes it."""
    if field.name == "loggers":  # as far as their packages are installed
        return "[tensorboard, curves]"
    value = field.default if field.default is not MISSING else field.default_factory()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def escaped(text: str) -> str:
    """Return a text for a cell of a table."""
    return re.sub(r"\|", r"\\|", text)


def page_of_commands() -> str:
    """Return the page of the command line: what `--help` prints, of the command and of each verb."""
    text = "# Command line\n\nEach block is what `--help` prints. [Exit codes](exit_codes.md) have their own page.\n\n"
    text += f"```text\n{help_of()}\n```\n"
    for verb in VERBS:
        text += f"\n## textenv {verb}\n\n```text\n{help_of(verb)}\n```\n"
    return text


def help_of(*verb: str) -> str:
    """Return what `textenv VERB --help` prints, at a width of 90 columns."""
    before, printed = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "90"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*verb, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return printed.getvalue().rstrip()


@cache
def generated_pages() -> dict[str, str]:
    """Return the pages that are made from the code: contents by name."""
    return {
        "reference/textenv.md": page_of_textenv(),
        **{f"reference/textenv.{room}.md": page_of_room(room) for room in ROOMS},
        "reference/agents.md": page_of_agents(),
        "reference/configuration.md": page_of_keys(),
        "reference/command_line.md": page_of_commands(),
    }


# What mkdocs calls


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are not in docs/; without jieba, warn, which ends a strict build."""
    from mkdocs.structure.files import File

    if find_spec("jieba") is None:  # without which the theme says nothing, and takes whole sentences for words
        logging.getLogger("mkdocs.hooks").warning(
            "Expected the package jieba, which finds the words of Chinese pages for the search, got none: "
            'pip install -c constraints.txt -e ".[docs]"'
        )

    for made in (pages_elsewhere, generated_pages):  # `mkdocs serve` builds anew after each change
        made.cache_clear()
    for name, text in {**pages_elsewhere(), **generated_pages()}.items():
        files.append(File.generated(config, name, content=text))
    for name in pictures_elsewhere():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links of the site, and put the drawings in."""
    name = page.file.src_uri
    if name == "CHANGELOG.md":
        page.meta["search"] = {"boost": 0.1}  # its long lists match any search, and would stand before the guides
    return markdown if name in generated_pages() else with_figures(with_links(markdown, name))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Declare Chinese pages as Chinese: browsers choose fonts by it, and screen readers their voice."""
    is_chinese = page.file.src_uri.startswith("zh/")
    return output.replace('<html lang="en"', '<html lang="zh-Hans"', 1) if is_chinese else output


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep the options in a page's sentences and tables whole."""
    return with_whole_options(html)
