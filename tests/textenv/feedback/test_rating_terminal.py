"""The rating terminal: answers it stores, explanations of invalid lines, and kills."""

import io
import os
import re
import signal
import sys
import time

import pytest
from rich.console import Console

from tests.helpers.command import ROOT
from textenv.feedback.asked import StandingAnswers, questions_of
from textenv.feedback.store import FeedbackStore
from textenv.feedback.terminal import RatingTerminal

SCRIPT = """
import sys
from textenv.feedback.store import FeedbackStore
from textenv.feedback.terminal import RatingTerminal
with FeedbackStore(sys.argv[1]) as store:
    print("all" if RatingTerminal(store, sys.argv[2]).run() else "quit", store.progress(sys.argv[2]))
"""


@pytest.fixture
def pexpect():
    """Return the library that runs a process in a terminal."""
    return pytest.importorskip("pexpect")


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "answers.db", seed=0) as store:
        yield store


def rate(store, lines, rater="ann", **kwargs):
    """Type lines, then end the input; return the result of `run`, the output and the prompts."""
    rest = iter(lines)
    asked = []

    def read(prompt):
        asked.append(prompt)
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=100, highlight=False)
    done = RatingTerminal(store, rater, console=console, read=read).run(**kwargs)
    return done, console.file.getvalue(), asked


def test_scores_with_a_live_count_and_mean(store):
    for text in (" good.", " bad.", " fair."):
        store.add("It was", [text])
    done, shown, asked = rate(store, ["5", "2", " 3.5 "])
    assert done and [answer.value for answer in store.answers()] == [(5.0,), (2.0,), (3.5,)]
    assert [line.partition(" |")[0] for line in asked] == ["0 answers", "1 answer, mean 5.00", "2 answers, mean 3.50"]
    assert "It was good." in shown and all(answer.seconds >= 0 for answer in store.answers())


@pytest.mark.parametrize("line", ["x", "", "6", "0.99", "nan", "inf", "1 2", "-", "Q1", "\x1b[A", "٣x"])
def test_invalid_scores_are_explained(store, line):
    store.add("It was", [" good."])
    done, shown, asked = rate(store, [line])
    assert not done and store.answers() == [] and len(asked) == 2
    assert "Expected a score from 1 to 5, got" in shown and "s skips" in shown
    assert "\x1b" not in shown


def test_help_undo_skip_and_quit(store):
    for text in (" a", " b", " c"):
        store.add("", [text])
    done, shown, _ = rate(store, ["u", "?", "1", "s", "u", "u", "4", "5", "q"])
    assert not done
    assert "Nothing to undo." in shown and "q quits (all answers are kept)" in shown
    assert [(answer.item, answer.value) for answer in store.answers()] == [(1, (4.0,)), (2, (5.0,))]
    done, shown, asked = rate(store, ["2"])
    assert done and len(asked) == 1 and asked[0].startswith("2 answers, mean 4.50")


def test_control_characters_of_a_model_are_shown_and_not_obeyed(store):
    store.add("\x1b]0;title\x07", ["\x1b[2Jgone [bold]x[/bold]\r\u202e", "\x9b1m"], kind="compare")
    _, shown, _ = rate(store, [])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "\\x1b[2Jgone [bold]x[/bold]\\r\\u202e" in shown and "\\x1b]0;title\\x07" in shown


def test_choices_refer_to_the_order_shown(store):
    for _ in range(8):
        store.add("It was", [" good.", " bad."], kind="compare")
    chosen = iter("aabbtnab")
    orders = []

    def read(prompt):
        assert "a or b for the better one" in prompt
        orders.append(store.next("ann").completions)
        return next(chosen)

    assert RatingTerminal(store, "ann", console=Console(file=io.StringIO()), read=read).run()
    assert len(set(orders)) == 2
    values = [answer.value for answer in store.answers()]
    expected = [order["ab".index(line)] for order, line in zip(orders, "aabb--ab") if line != "-"]
    assert [(" good.", " bad.")[value] for value in values if isinstance(value, int)] == expected
    assert values[4:6] == ["tie", "both_bad"]


def test_ranks_refer_to_the_order_shown(store):
    store.add("It was", [" good.", " bad.", " fair."], kind="rank")
    shown = store.next("ann").completions
    best_first = sorted(shown, key=[" good.", " fair.", " bad."].index)
    line = " ".join(str(shown.index(text) + 1) for text in best_first)
    done, said, _ = rate(store, ["1 2", "1 1 2", "0 1 2", "a b c", line])
    assert done and said.count("Expected the numbers 1 to 3, the best first") == 4
    assert store.answers()[0].value == (0, 2, 1)


def test_only_the_questions_asked_for_and_undo_within_them(store):
    old = store.add("old", ["x"])
    store.score(store.next("ann"), [1])
    new = [store.add("new", ["y"]), store.add("new", ["z"])]
    later = store.add("later", ["w"])
    done, shown, asked = rate(store, ["u", "2", "u", "3", "4"], items=new)
    assert done and "acted upon" in shown
    assert {answer.item: answer.value for answer in store.answers()} == {old: (1.0,), new[0]: (3.0,), new[1]: (4.0,)}
    assert store.next("ann").id == later


def test_standing_answers_follow_undo_and_leave_repeats_out(store):
    item = store.add("It was", [" good."], gold=True, run="mine")
    standing = StandingAnswers(store)
    store.score(store.next("ann"), [3])
    store.score(store.next("ann"), [5])  # the second showing of the gold item
    assert [(answer.item, answer.value) for answer in standing.update()] == [(item, (3.0,))]
    store.undo("ann"), store.undo("ann")
    assert standing.update() == []
    assert [(question.id, question.scale) for question in questions_of(store._db.path, "mine")] == [(item, (1.0, 5.0))]
    assert questions_of(store._db.path, "other") == []


def spawn(pexpect, path, rater):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    return pexpect.spawn(
        sys.executable, ["-c", SCRIPT, str(path), rater], env=environment, encoding="utf-8", timeout=20
    )


def test_in_a_terminal_that_is_killed_nothing_acknowledged_is_lost(store, tmp_path, pexpect):
    for number in range(4):
        store.add("It was", [f" text {number}"])
    child = spawn(pexpect, tmp_path / "answers.db", "ann")
    child.expect("text 0"), child.sendline("4")
    child.expect("1 answer, mean 4.00"), child.sendline("2")
    child.expect("2 answers, mean 3.00")
    child.send("5")  # a line without its end
    child.kill(signal.SIGKILL), child.wait()
    assert [answer.value for answer in store.answers()] == [(4.0,), (2.0,)]
    child = spawn(pexpect, tmp_path / "answers.db", "ann")
    child.expect("text 2"), child.expect("2 answers, mean 3.00")
    child.sendline("u"), child.expect("Undone: the answer to score 2"), child.sendline("1")
    child.expect("mean 2.50"), child.sendline("q")
    child.expect("quit Progress"), child.expect(pexpect.EOF)
    assert [answer.value for answer in store.answers()] == [(4.0,), (1.0,)]


@pytest.mark.slow
def test_ctrl_c_and_ctrl_d_end_the_terminal(store, tmp_path, pexpect):
    store.add("It was", [" good."])
    for key, said in (("\x04", "quit Progress"), ("\x03", "KeyboardInterrupt")):
        child = spawn(pexpect, tmp_path / "answers.db", "ann")
        child.expect("0 answers"), child.send(key), child.expect(said), child.expect(pexpect.EOF)
    assert store.next("bob") is not None and store.answers() == []


@pytest.mark.slow
def test_two_raters_at_once_share_the_questions(store, tmp_path, pexpect):
    n = 12
    for number in range(n):
        store.add("It was", [f" text {number}."])
    children = {name: spawn(pexpect, tmp_path / "answers.db", name) for name in ("ann", "bob")}
    for turn in range(n // 2):
        for child in children.values():
            child.expect(rf"{turn} answers?"), child.sendline("3")
    for child in children.values():  # a child may still show an item that the other has answered
        if child.expect(["6 answers.*: $", "all Progress"]) == 0:
            child.sendline("q")
        child.expect(pexpect.EOF)
    answers = store.answers()
    assert len({answer.item for answer in answers}) == len(answers) == n
    assert {answer.rater for answer in answers} == {"ann", "bob"}


def test_waits_for_new_questions(store, monkeypatch):
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            store.add("It was", [" late."])

    monkeypatch.setattr(time, "sleep", pause)
    done, shown, asked = rate(store, ["4", "q"], wait=False)
    assert done and not asked
    store.add("It was", [" early."])
    done, shown, asked = rate(store, ["4", "q"], wait=True)
    assert not done and shown.index("early") < shown.index("late") and len(pauses) == 3
