"""The tests that a documentation page names, looked up by file name in every folder of tests/."""

import re

from tests.helpers.command import ROOT

NAMED_TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def table_rows(page):
    """Return the rows of a page's tables, without their headers."""
    lines = page.splitlines()
    return [
        line
        for line, next_line in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("| ") and not next_line.startswith("|---")
    ]


def absent_tests(page):
    """Return the tests that a page names and that no file in tests/ defines."""
    return [f"{file}::{name}" for file, name in NAMED_TEST.findall(page) if not _is_defined(file, name)]


def _is_defined(file, name):
    paths = (ROOT / "tests").rglob(file)
    return any(f"\ndef {name}(" in path.read_text(encoding="utf-8") for path in paths)
