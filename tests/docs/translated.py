"""A page and its translation, compared block by block: headings, code, names, links and numbers."""

import posixpath
import re
from collections import defaultdict
from difflib import SequenceMatcher
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

from tests.helpers.command import ROOT

NAME = re.compile(r"(?<!`)`([^`]+)`(?!`)")  # may run over a line's end
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
COMMENT = re.compile(r"(?:^|(?<=\s))#.*$")
COMMENTED = ("bash", "python", "yaml")  # languages in which COMMENT is one
STARTS = {"|": "row of a table", "![": "picture", "- ": "item of a list", "#": "heading"}
HAN = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"  # characters of Chinese, and its punctuation
BROKEN = re.compile(rf"{HAN}\n|\n{HAN}")


class Block(NamedTuple):
    """A paragraph, a heading, a picture, an item of a list, a row of a table, a fence, or a line of code.

    Attributes:
        line: The number of its first line in the page, from 1.
        kind: What it is; a fence and a line of code with their language.
        text: Its lines.
    """

    line: int
    kind: str
    text: str


@cache
def twins():
    """Return the pages that have a translation: the name of the Chinese page by that of the English one."""
    chinese = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/zh/**/*.md"))]
    return {"README.md": "README.zh.md", **{name.replace("docs/zh/", "docs/"): name for name in chinese}}


def blocks(text):
    """Return the blocks of a page in their order."""
    found, language, goes_on = [], None, False
    for number, line in enumerate(text.splitlines(), start=1):
        kind = next((kind for start, kind in STARTS.items() if line.startswith(start)), "paragraph")
        if line.startswith("```"):
            language, goes_on = line.strip("`") or "text" if language is None else None, False
            found.append(Block(number, f"fence of {language or 'the end'}", line))
        elif language:
            found.append(Block(number, f"line of {language}", line))
        elif goes_on and line.strip() and kind == "paragraph":
            found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line}")
        else:
            goes_on = bool(line.strip()) and kind in ("paragraph", "item of a list")
            found += [Block(number, kind, line)] if line.strip() else []
    return found


def facts(block, page, names):
    """Return what a translation must keep of a block: pairs of kind and words, each with its lines.

    Args:
        block: The block.
        page: The name of the page, from which its links are resolved.
        names: The English name of each Chinese page; a link to the translation counts as one to the page.
    """
    text = block.text
    if block.kind.startswith("line of"):
        words = COMMENT.sub("#", text) if block.kind.removeprefix("line of ") in COMMENTED else text
        return {("code", words): [block.line]}
    matches = [("name", " ".join(name[1].split()), text, name) for name in NAME.finditer(text)]
    text = NAME.sub(lambda name: "`" + "\n" * name[0].count("\n"), text)  # keeps the lines of what follows
    matches += [("link", resolved(link[1], page, names), text, link) for link in LINK.finditer(text)]
    text = LINK.sub("]", text)
    matches += [("number", number[0], text, number) for number in NUMBER.finditer(text)]
    if heading := re.match(r"#+", text):
        matches.append(("heading", heading[0], text, heading))
    lines = defaultdict(list)
    for kind, words, searched, match in matches:
        lines[kind, words].append(block.line + searched.count("\n", 0, match.start()))
    return lines


def resolved(link, page, names):
    """Return a link's target from the root of the repository, with the English name of a Chinese page."""
    if re.match(r"https?:|mailto:|#", link):
        return link
    path, hash_sign, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    return names.get(target, target) + hash_sign + anchor


def differences(english, chinese, texts):
    """Return the differences of two pages, each with file, line, and what is missing or too much.

    Args:
        english: The name of the English page.
        chinese: The name of the Chinese one.
        texts: The texts of both, by name.
    """
    names = {theirs: ours for ours, theirs in {**twins(), english: chinese}.items()}
    ours, theirs = (
        [(block, facts(block, page, names)) for block in blocks(texts[page])] for page in (english, chinese)
    )
    signs = [
        [(block.kind, *sorted((fact, len(lines)) for fact, lines in found.items())) for block, found in side]
        for side in (ours, theirs)
    ]
    found = []
    for kind, i, j, k, m in SequenceMatcher(None, *signs, autojunk=False).get_opcodes():
        for our, their in zip_longest(ours[i:j], theirs[k:m]) if kind != "equal" else ():
            if our and their and our[0].kind == their[0].kind:
                found += differences_of_facts(english, chinese, our, their)
                continue
            if our:
                place = f"{chinese}:{theirs[k - 1][0].line if k else 0}"
                found.append(f"{place}: {shown(our[0])} is missing after this line, {english}:{our[0].line} has it")
            if their:
                there = f"{english}:{ours[i - 1][0].line if i else 0}"
                found.append(f"{chinese}:{their[0].line}: {shown(their[0])} is too much, {there} goes on without it")
    return found


def differences_of_facts(english, chinese, our, their):
    """Return the differences of two blocks of the same kind, which come with their facts."""
    (block, expected), (translation, got) = our, their
    found = []
    for fact in dict.fromkeys([*expected, *got]):
        there, here = expected.get(fact, []), got.get(fact, [])
        place = f"{chinese}:{(here or [translation.line])[-1]}: {fact[0]} `{fact[1]}`"
        found += [f"{place} is missing, {english}:{line} has it" for line in there[len(here) :]]
        found += [f"{place} is too much, not at {english}:{block.line}"] * (len(here) - len(there))
    return found


def shown(block):
    """Return a block in words: its kind, and the beginning of its text."""
    return f"{block.kind} `{block.text.partition(chr(10))[0][:60]}`"


def links_past_the_translation(chinese, text):
    """Return the links of a Chinese page to English pages that have a translation, but for the one to its own."""
    translated = {english: theirs for english, theirs in twins().items() if theirs != chinese}
    found = []
    for block in blocks(text):
        links = [] if block.kind.startswith("line of") else LINK.findall(NAME.sub("`", block.text))
        for link in links:
            if theirs := translated.get(resolved(link.partition("#")[0], chinese, {})):
                found.append(f"{chinese}:{block.line}: link to {link}, whose translation is {theirs}")
    return found


def broken_lines(chinese, text):
    """Return the line ends within Chinese sentences, which browsers show as a space between two characters."""
    return [
        f"{chinese}:{block.line}: line ends within a Chinese paragraph, which shows as a space; write it in one line"
        for block in blocks(text)
        if BROKEN.search(block.text)
    ]
