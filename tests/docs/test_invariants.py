"""The codes of invariants: each cited one is defined in docs/invariants.md, with tests that exist."""

import re
from pathlib import Path

from tests.helpers.command import ROOT
from tests.helpers.pages import NAMED_TEST, absent_tests, table_rows

PAGE = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
SELF = (ROOT / "docs" / "invariants.md", Path(__file__).resolve())
PATTERNS = (
    "agents/**/*.py",
    "benchmarks/**/*.py",
    "docs/*.md",
    "examples/**/*.py",
    "tests/**/*.py",
    "textenv/**/*.py",
    "*.md",
)
IN_TEXT = re.compile(r"\b[A-F][1-9][0-9]?\b")
IN_A_NAME = re.compile(r"(?<=_)[a-f][1-9][0-9]?(?=_)")


def cited_codes(text):
    """Return the codes that a file cites, in its text and in the names of its tests."""
    names = re.findall(r"\bdef test(_\w+)", text)
    return {*IN_TEXT.findall(text)} | {code.upper() for name in names for code in IN_A_NAME.findall(name)}


def defined_codes(page):
    """Return the codes of a page's rows, in their order."""
    return [row.split(" | ")[0].removeprefix("| ") for row in table_rows(page)]


def test_every_cited_code_is_defined_and_every_defined_one_cited():
    paths = {path for pattern in PATTERNS for path in ROOT.glob(pattern)} - {*SELF}
    cited = set().union(*(cited_codes(path.read_text(encoding="utf-8")) for path in paths))
    assert cited == {*defined_codes(PAGE)}


def test_every_row_names_tests_that_are_there():
    rows, codes = table_rows(PAGE), defined_codes(PAGE)
    assert len({*codes}) == len(codes) > 40
    assert [row for row in rows if not NAMED_TEST.search(row)] == []
    assert absent_tests(PAGE) == []


def test_codes_are_found_in_texts_and_in_names_of_tests():
    text = '"""Sampling (A2, E12)."""\ndef test_b3_c4_the_end(): ...\ndef test_a_reward(): ...\n# D1: U+E000, ROUGE-1'
    assert cited_codes(text) == {"A2", "E12", "B3", "C4", "D1"}
    assert defined_codes("| code | what holds |\n|---|---|\n| A1 | x |\n| B10 | y |\n") == ["A1", "B10"]
