"""The notebooks: Python files in jupytext's percent format, run from top to bottom as a reader would run them."""

import re

import pytest

from tests.docs.test_examples import run
from tests.helpers.command import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NAMES = ("quickstart", "your_own_reward", "see_what_a_token_earned")
CELL = re.compile(r"^# %%(.*)$", flags=re.MULTILINE)


def cells(text):
    """Return the cells of a file in percent format: (kind, lines), where the kind of code is empty."""
    head, *parts = CELL.split(text)
    assert not head.strip(), "something stands above the first cell"
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [(kind.strip(), content.strip().splitlines()) for kind, content in pairs]


def test_there_are_these_notebooks_and_no_second_copy_of_them():
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_file()) == sorted(f"{name}.py" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_explains_and_then_does(name):
    found = cells((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert {kind for kind, _ in found} == {"", "[markdown]"} and len(found) > 6
    assert found[0][0] == "[markdown]" and found[0][1][0].startswith("# # ")
    for kind, lines in found:
        assert lines and (kind == "" or all(line.startswith("#") for line in lines)), lines[:1]


@pytest.mark.parametrize("text", ["import os\n# %%\nx = 1", "# %% [markdown]\nno comment", "# %%\n"])
def test_a_file_that_is_no_notebook_is_found(tmp_path, monkeypatch, text):
    monkeypatch.setattr("tests.docs.test_notebooks.FOLDER", tmp_path)
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(AssertionError):
        test_a_notebook_explains_and_then_does("bad")


def numbers(pattern, out):
    """Return the numbers of the one place of the output that a pattern describes."""
    (found,) = re.findall(pattern, out)
    return [float(number) for number in found]


@pytest.mark.slow
def test_quickstart_learns_and_still_writes_reviews():
    out = run(FOLDER / "quickstart.py")
    before, after = numbers(r"mean reward: ([\d.]+) before, ([\d.]+) after", out)
    assert before < 0.7 and after > before + 0.2
    followed = numbers(r"follow the grammar: (\d+)% before, (\d+)% after", out)
    assert min(followed) > 50


@pytest.mark.slow
def test_the_reward_of_ones_own_is_learned_in_both_parts():
    out = run(FOLDER / "your_own_reward.py")
    assert "{'kind': 1.0, 'short': 0.0}" in out and "{'kind': 1.0, 'short': -0.3}" in out
    kind, short = numbers(r"before +kind ([\d.-]+) +short ([\d.-]+)", out)
    kind_after, short_after = numbers(r"after +kind ([\d.-]+) +short ([\d.-]+)", out)
    assert kind_after > kind + 0.2 and short_after > short + 0.2


@pytest.mark.slow
def test_words_of_mood_earn_and_cost_and_other_words_do_neither():
    out = run(FOLDER / "see_what_a_token_earned.py")
    total, by_formula = numbers(r"earned: ([\d.-]+), by the formula: ([\d.-]+)", out)
    assert abs(total - by_formula) < 2e-4  # both are printed with four digits
    positive, negative, other = (
        [float(amount) for amount in re.findall(rf"{mood} +([+-][\d.]+) a token", out)]  # before and after training
        for mood in ("positive", "negative", "other")
    )
    assert positive[0] > 0.1 and negative[0] < -0.1 and abs(other[0]) < 0.03
    assert positive[1] < positive[0] / 2  # what is expected earns nothing
