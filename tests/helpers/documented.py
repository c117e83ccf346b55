"""The commands in the documentation and in docstrings, each as the words that a shell would split it into."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from agents.cli.main import VERBS
from tests.helpers.command import ROOT

PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
CODE = ("examples/**/*.py", "benchmarks/**/*.py", "agents/**/*.py", "textenv/**/*.py")
SETTINGS = ("examples/**/*.yml",)

PROGRAMS = ("textenv", "python", "pytest", "torchrun", "accelerate", "pip")
BEGINS = re.compile(rf"\s*(?:[A-Z_]+=\S* )*(?:{'|'.join(PROGRAMS)}) ")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")  # may run over one line's end
ASIDE = re.compile(r": ((?:torchrun|accelerate launch|python \S+\.py|pytest|textenv) .*)")  # "on GPUs: torchrun ..."
REMARK = re.compile(r" {2,}\([^()]*\)$")  # a remark after a command: "...   (goes on)"
OPTIONAL = re.compile(r"\[(-[^\]]*)\]")
TABLE_ROW = re.compile(r"^\| (`.*?) \| (.*) \|$", flags=re.MULTILINE)


class Command(NamedTuple):
    """A command of the documentation.

    Attributes:
        where: The file, from the root of the repository.
        words: The words that a shell makes of it, without variables in front and without the placeholder "...".
    """

    where: str
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.where}: {shlex.join(self.words)}"


def commands():
    """Return all commands of the repository, each once per file."""
    found = []
    for patterns, read in ((PAGES, of_page), (CODE, of_code), (SETTINGS, of_settings)):
        for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
            where = path.relative_to(ROOT).as_posix()
            found += [Command(where, words) for words in read(path.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(found))


def of_page(text):
    """Return the commands of a page: in blocks and their comments, in the text, and in tables of verbs."""
    rest = FENCE.sub("", text)
    found = of_blocks(text)
    for language, block in FENCE.findall(text):
        found += of_comments(block) if language == "python" else []
    found += of_lines([line[4:] for line in rest.splitlines() if line.startswith("    ")])
    return found + of_inline(rest) + of_tables(rest)


def of_blocks(text):
    """Return the commands of a page's blocks that are not Python."""
    blocks = [block for language, block in FENCE.findall(text) if language != "python"]
    return [words for block in blocks for words in of_lines(block.splitlines())]


def of_tables(text):
    """Return the commands of a page's tables of verbs."""
    rows = [(first.replace("\\|", "|"), second) for first, second in TABLE_ROW.findall(text)]
    return [words for first, second in rows for words in of_verbs(first, second)]


def of_verbs(first, second):
    """Return the commands of a table row: each verb of the first cell with each option of the second."""
    verbs = [code for code in INLINE.findall(first) if re.match(r"[a-z-]+( |$)", code)]
    if re.sub(r"`[^`]*`|[, ]", "", first) or not verbs or verbs[0].split()[0] not in VERBS:
        return []
    options = [code for code in INLINE.findall(second) if code.startswith("--")]
    return [words for verb in verbs for more in ("", *options) for words in of_lines([f"textenv {verb} {more}"])]


def of_code(text):
    """Return the commands of a module: in its docstrings, indented or in the text, and in its comments."""
    found = of_comments(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            page = ast.get_docstring(node) or ""
            found += of_lines([line[4:] for line in page.splitlines() if line.startswith("    ")]) + of_inline(page)
    return found


def of_comments(text):
    """Return the commands of comments: after a colon, or in the text."""
    comments = re.findall(r"(?:^|\s)# (.*)$", text, flags=re.MULTILINE)
    asides = [aside for comment in comments for aside in ASIDE.findall(comment)]
    return of_lines(asides) + of_inline("\n".join(comments))


def of_settings(text):
    """Return the commands of a YAML file: indented in its comments, or in their text."""
    comments = [line.removeprefix("#").removeprefix(" ") for line in text.splitlines() if line.startswith("#")]
    indented = [line[2:] for line in comments if line.startswith("  ")]
    return of_lines(indented) + of_inline("\n".join(line for line in comments if not line.startswith("  ")))


def of_inline(text):
    """Return the commands among the texts between backticks."""
    return of_lines([" ".join(code.split()) for code in INLINE.findall(text)])


def of_lines(lines):
    """Return the commands of lines as they are typed, with comments, pipes, and quotes over several lines."""
    found, open_line = [], ""
    for line in lines:
        found += of_lines(ASIDE.findall(line.partition(" # ")[2]))
        open_line += OPTIONAL.sub(r"\1", REMARK.sub("", line))
        if open_line.endswith("\\"):
            open_line = open_line[:-1]
            continue
        try:
            words = shlex.split(open_line, comments=True)
        except ValueError:  # a quote is open: join the next line
            open_line = f"{open_line}\n" if BEGINS.match(open_line) else ""
            continue
        open_line = ""
        found += of_words(words)
    return found


def of_words(words):
    """Return the commands of a line, which `&&`, `|` and the like separate."""
    found, current = [], []
    for word in [*words, "&&"]:
        if word in ("&&", "||", "|", ";", ">"):
            found.append(tuple(current))
            current = []
        elif word != "...":
            current += [] if not current and re.match(r"[A-Z_]+=", word) else [word]  # no variable in front
    return [(Path(words[0]).name, *words[1:]) for words in found if is_command(words)]


def is_command(words):
    """Return whether words start one of `PROGRAMS`, and are no mere mention of its name."""
    return bool(words) and Path(words[0]).name in PROGRAMS and (len(words) > 1 or words[0] == "pytest")
