"""The table of reliability: each row names tests, and all of them are there."""

import re

from tests.command import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def absent(page):
    """The tests that a page names and that no file has."""
    return [
        f"{file}::{name}"
        for file, name in NAMED.findall(page)
        if f"\ndef {name}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]


def test_every_row_names_tests_that_are_there():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what happens")]
    assert len(rows) > 20
    assert [row for row in rows if not NAMED.search(row)] == []
    assert absent(PAGE) == []


def test_a_test_that_is_gone_is_noticed():
    assert absent("| a | b | `test_reliability.py::test_gone` |") == ["test_reliability.py::test_gone"]
