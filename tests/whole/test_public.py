"""What is public: names, signatures and verbs are those of the snapshot, and a change of them must be meant."""

import difflib

import pytest

import agents
import textenv
from tests.whole import public
from tests.whole.public import PUBLIC, SNAPSHOT, entry, snapshot
from textenv import Turn
from textenv.adapters import Calculator

CURE = "If each change is meant: python -m tests.whole.public, and a line in CHANGELOG.md for whoever uses the name."


def changes():
    """Return the lines by which the public names differ from the snapshot."""
    before, now = SNAPSHOT.read_text(encoding="utf-8").splitlines(), snapshot().splitlines()
    lines = difflib.unified_diff(before, now, "snapshot", "now", n=1, lineterm="")
    return [line for line in lines if line[0] != "@"][2:]


def signed(lines):
    """Return the lines that are gone or new, without those around them."""
    return [line for line in lines if line[0] in "+-"]


def test_the_public_names_are_those_of_the_snapshot():
    lines = changes()
    assert not lines, "\n".join([f"Expected the public names of {SNAPSHOT.name}, got", *lines, CURE])


def test_the_snapshot_is_the_same_in_each_process():
    assert " at 0x" not in snapshot()


def renamed(self, most_chars: int = 100) -> None: ...


def another_default(self, max_chars: int = 99) -> None: ...


@pytest.mark.parametrize(
    ("function", "now"),
    [(renamed, "(most_chars: int = 100)"), (another_default, "(max_chars: int = 99)")],
)
def test_a_changed_parameter_is_found(monkeypatch, function, now):
    monkeypatch.setattr(Calculator, "__init__", function)
    head = "class textenv.adapters.Calculator"
    assert signed(changes()) == [f"-{head}(max_chars: int = 100)", f"+{head}{now}"]


def test_a_method_that_is_gone_is_found(monkeypatch):
    monkeypatch.delattr(agents.AdaptiveCoef, "next")
    assert signed(changes()) == ["-    def next(coef: float, kl: float, n_episodes: int) -> float"]


def test_a_name_that_is_gone_or_new_is_found(monkeypatch):
    monkeypatch.setitem(PUBLIC, "textenv", [name for name in textenv.__all__ if name != "Turn"])
    assert signed(changes()) == ["-class textenv.Turn of tuple(text: str, response: str | None)"]
    monkeypatch.setitem(PUBLIC, "textenv", [*textenv.__all__, "env"])
    assert signed(changes()) == ["+module textenv.env"]


def test_an_argument_of_a_verb_that_is_gone_is_found(monkeypatch):
    show = public.VERBS["show"]
    monkeypatch.setitem(public.VERBS, "show", show._replace(config=public.VERBS["chat"].config))
    verbs, arguments = (lines := signed(changes()))[:2], lines[2:]
    assert verbs == ["-verb textenv show: ShowOptions, ShowFlags", "+verb textenv show: ChatOptions, ShowFlags"]
    assert len(arguments) == 1 and arguments[0].startswith("-arguments ShowOptions(run: str, prompt: int = 0, ")


def test_a_signature_names_what_must_be_named():
    def short(a, *, b=1, **more): ...

    def starred(a: int, *rest: str, b: type = Turn) -> None: ...

    assert list(public.signature("def short", short)) == ["def short(a, *, b = 1, **more)"]
    assert list(public.signature("def starred", starred)) == ["def starred(a: int, *rest: str, b: type = Turn) -> None"]


def test_a_long_signature_has_a_line_for_each_parameter():
    lines = list(entry("agents", "make_agent"))
    assert lines[0] == "def agents.make_agent(" and lines[-1].startswith(") -> ")
    assert all(line.startswith("    ") and line.endswith(",") for line in lines[1:-1])
