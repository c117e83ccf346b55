"""The table of docs/reliability.md: each row names tests, and all of them exist."""

from tests.helpers.command import ROOT
from tests.helpers.pages import NAMED_TEST, absent_tests, table_rows

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_row_names_tests_that_are_there():
    rows = table_rows(PAGE)
    assert len(rows) > 20
    assert [row for row in rows if not NAMED_TEST.search(row)] == []
    assert absent_tests(PAGE) == []


def test_a_test_that_is_gone_is_noticed():
    page = "| a | b | `test_reliability.py::test_gone`, `test_cache.py::test_a7_script` |"
    assert absent_tests(page) == ["test_reliability.py::test_gone"]
