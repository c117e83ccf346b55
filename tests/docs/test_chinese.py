"""The Chinese pages: they have the blocks of the English ones, and in each the same code, names, numbers and links."""

import re

import pytest

from tests.docs.translated import broken_lines, differences, links_past_the_translation, twins
from tests.helpers.command import ROOT

TWINS = twins()
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for pair in TWINS.items() for name in pair}
README, ZH = "README.md", "README.zh.md"


def report(found):
    """Fail with all messages, which an assertion would shorten."""
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_the_readme_and_three_pages_are_translated():
    assert set(TWINS) >= {README, "docs/index.md", "docs/guides/reward.md", "docs/guides/people.md"}
    assert TEXTS[README].count("\n") <= 150


@pytest.mark.parametrize("english", TWINS)
def test_a_translation_agrees_with_its_page(english):
    report(differences(english, TWINS[english], TEXTS))


@pytest.mark.parametrize("chinese", TWINS.values())
def test_a_chinese_page_is_written_as_chinese_pages_are(chinese):
    report(links_past_the_translation(chinese, TEXTS[chinese]) + broken_lines(chinese, TEXTS[chinese]))


# A change of one page alone is found, whichever it is


def lines_of_code(text):
    """Return a match for each line of a page's code, up to its comment."""
    fences = re.finditer(r"^```.*\n((?:.*\n)*?)```$", text, flags=re.MULTILINE)
    lines = re.compile(r"^[^\n#]+", flags=re.MULTILINE)
    return [line for fence in fences for line in lines.finditer(text, *fence.span(1))]


STEP = 5  # each fifth occurrence is changed, to save seconds
CHANGES = {
    "number": (re.compile(r"\d+").finditer, "98765"),
    "name": (re.compile(r"(?<!`)`[^`]+`(?!`)").finditer, "`nothing`"),
    "link": (re.compile(r"\]\([^)\s]+\)").finditer, "](nowhere.md)"),
    "heading": (re.compile(r"^#+ ", flags=re.MULTILINE).finditer, ""),
    "code": (lines_of_code, "another line"),
    "row": (re.compile(r"(?<=\|\n)\| .*[`(\d].*\n").finditer, ""),
}


@pytest.mark.parametrize("changed", ["english", "chinese"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_one_page_is_found_with_its_line(what, changed):
    find, replacement = CHANGES[what]
    n_changes = 0
    for pair in TWINS.items():
        page = pair[changed == "chinese"]
        for match in list(find(text := TEXTS[page]))[::STEP]:
            line = text.count("\n", 0, match.start()) + (what != "row")  # without a row, the line before it is named
            texts = {**TEXTS, page: f"{text[: match.start()]}{replacement}{text[match.end() :]}"}
            assert f"{page}:{line}" in "\n".join(differences(*pair, texts)), f"{page}:{line}: {match[0]}"
            n_changes += 1
    assert n_changes >= 4


def test_the_messages_say_what_is_missing_and_where():
    english = "# A\n\nOf 0.447 and\nafter 0.708, by\n`textenv\ntrain`.\n\n```bash\npytest -m slow  # a\npytest\n```\n"
    chinese = "# 甲\n\n训练前 0.447，训练后 0.709。\n\n```bash\npytest -m slow  # 乙\npytest -x\n```\n"
    assert differences(README, ZH, {README: english, ZH: chinese}) == [
        "README.zh.md:3: name `textenv train` is missing, README.md:5 has it",
        "README.zh.md:3: number `0.708` is missing, README.md:4 has it",
        "README.zh.md:3: number `0.709` is too much, not at README.md:3",
        "README.zh.md:7: code `pytest` is missing, README.md:10 has it",
        "README.zh.md:7: code `pytest -x` is too much, not at README.md:10",
    ]
    rows = "| a | 1 |\n| b | 2 |\n"
    assert differences(README, ZH, {README: f"{rows}| c | 3 |\n", ZH: rows}) == [
        "README.zh.md:2: row of a table `| c | 3 |` is missing after this line, README.md:3 has it"
    ]
    assert differences(README, ZH, {README: rows, ZH: f"| 丙 | 3 |\n{rows}"}) == [
        "README.zh.md:1: row of a table `| 丙 | 3 |` is too much, README.md:0 goes on without it"
    ]


def test_links_to_translated_pages_go_to_the_translation():
    text = "# 甲\n\n[English](../../guides/reward.md) [概念](../../concepts.md) [开始](../../index.md#install)\n"
    assert links_past_the_translation("docs/zh/guides/reward.md", text) == [
        "docs/zh/guides/reward.md:3: link to ../../index.md#install, whose translation is docs/zh/index.md"
    ]


@pytest.mark.parametrize(
    ("text", "n_found"), [("奖励\n函数\n", 1), ("`a`，\n`b`\n", 1), ("奖励\n\n函数\n", 0), ("![a](b)\n![c](d)\n", 0)]
)
def test_a_line_that_ends_within_a_sentence_is_found(text, n_found):
    assert len(broken_lines(ZH, text)) == n_found
