"""Tools in games: the syntax of calls, results that are observed and never trained, and limits."""

import json
import subprocess
from functools import partial

import pytest

from tests.helpers.games import TOKENIZER, Guess, write
from textenv import CharTokenizer, check_text_env
from textenv.adapters import Calculator, GameError, ToolGame, TurnEnv, python_tool
from textenv.adapters.python_tool import PythonTool
from textenv.adapters.tools import ToolError


class Sum:
    def reset(self, *, seed):
        self.a, self.b = seed + 12, seed + 30
        return f"{self.a}*{self.b} = ", {}

    def step(self, text):
        return "", float(text == str(self.a * self.b)), True, False, {}


tool_sum = partial(ToolGame, Sum, {"calc": Calculator()}, reply=" = {} . ")


def test_a_call_is_answered_by_the_tool_and_is_no_move():
    game = ToolGame(Guess, {"calc": Calculator(), "say": str.upper})
    game.reset(seed=0)
    assert game.step("so <calc> 2+3 </calc> then 9") == ("<result>5</result>", 0.0, False, False, {"tool": "calc"})
    assert game.step("<say>a\nb</say><calc>1</calc>")[0] == "<result>A\nB</result>"  # only the first call
    assert game.step("<calc>1+1")[0] == "<result>2</result>"  # the end tag may be the stop string, which the text lacks
    assert game.step("<calc>two</calc>")[0].startswith("<result>error: expected numbers")
    assert game.game.n_turns == 0
    assert game.step("calc 1+1")[0] == " no " and game.step("<other>1</other>")[0] == " no "
    assert game.game.n_turns == 2


def test_a_result_is_observed_and_never_trained():
    env = TurnEnv(tool_sum, TOKENIZER, turn_tokens=20, max_new_tokens=60, n_games=2, stop=["</calc>"])
    env.reset(options={"prompts": [{"seed": 0}]})
    steps = [env.step(token) for token in TOKENIZER.encode("<calc>12*30</calc>")]
    observation = steps[-1][0]
    assert TOKENIZER.decode(observation[observation >= 0].tolist()) == "12*30 = <calc>12*30</calc> = 360 . "
    steps += write(env, "360/")
    assert [step[1] for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
    assert steps[-1][2] and steps[-1][4]["episode"] == {"r": 1.0, "l": len("<calc>12*30</calc>360/")}


def test_a_tool_env_passes_the_checks():
    tokenizer = CharTokenizer(TOKENIZER.alphabet + "%:")
    check_text_env(TurnEnv(tool_sum, tokenizer, turn_tokens=16, max_new_tokens=60, n_games=2, stop=["</calc>"]))


def test_a_tool_with_a_bug_ends_training_and_names_seed_and_text():
    def broken(text):
        raise KeyError(text)

    env = TurnEnv(partial(ToolGame, Guess, {"t": broken}), TOKENIZER, turn_tokens=6, n_games=1)
    env.reset()
    with pytest.raises(GameError, match=r"seed 0 raised KeyError\('a'\) at '<t>a'"):
        write(env, "<t>a/")


@pytest.mark.parametrize(("kwargs", "message"), [({"tools": {}}, "at least one tool"), ({"reply": "x"}, "to have {}")])
def test_what_cannot_work_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ToolGame(**{"game": Guess, "tools": {"calc": Calculator()}, **kwargs})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1+2*3", "7"), ("-(2 - 5)", "3"), ("7/2", "3.5"), ("1/3", "0.3333333333"), ("7//2 + 7%4", "6"), ("2**10", "1024"),
     ("10**15", "1000000000000000"), ("4**0.5", "2"), ("+3", "3"), ("2e3", "2000")],
)  # fmt: skip
def test_the_calculator_calculates(text, value):
    assert Calculator()(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "1+", "x", "__import__('os')", "1 if 1 else 2", "[1]", "'a'*3", "True", "1j", "(-8)**0.5", "1/0", "1%0",
     "0**-1", "10**16", "9**9**9", "2**51", "10**10*10**10", "1e10**40", "1e999", "1" * 101, "(" * 60 + "1" + ")" * 40,
     "1 2", "f(1)", "1;2", "1\n2", "\0"],
)  # fmt: skip
def test_the_calculator_refuses_all_else(text):
    with pytest.raises(ToolError):
        Calculator()(text)


@pytest.mark.parametrize(
    "text", ["-" * 100_000 + "1", "+".join(["1"] * 50_000), "1" + "**1" * 5000, "(" * 100_000 + "1" + ")" * 100_000,
             "not " * 5000 + "1", "9**9**9", "9" * 5000, "\ud800", "[" * 100_000],
    ids=lambda text: text[:6].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_the_calculator_survives_huge_expressions(text):
    with pytest.raises(ToolError, match=r"^expected"):
        Calculator(max_chars=10**6)(text)


@pytest.mark.parametrize(("text", "message"), [("'\ud800'", "expected a text"), ("chr(0xd800)", "expected a result")])
def test_half_a_character_is_no_text(text, message):
    """A tokenizer raises on a lone surrogate, which would end the training."""
    with pytest.raises(ToolError, match=f"{message} that UTF-8 can write, got a lone surrogate"):
        PythonTool()(text)


def test_python_evaluates_an_expression():
    tool = PythonTool()
    assert tool("sorted({w: len(w) for w in 'to be or not'.split()}.items())[0]") == "('be', 2)"
    assert tool("math.floor(math.pi * 100)") == "314"
    assert tool("'x' * 1000") == "x" * 200  # the rest is cut


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("x = 1", "SyntaxError"),
        ("open('/etc/passwd')", "NameError: name 'open' is not defined"),
        ("__import__('os')", "NameError: no name __import__ here"),
        ("().__class__", "NameError: no attribute __class__ here"),
        ("(i for i in [1]).gi_frame", "NameError: no attribute gi_frame here"),
        ("'{0.real}'.format(1)", "NameError: no attribute format here"),
        ("math.__loader__", "NameError: no attribute __loader__ here"),
        ("eval('1')", "NameError: name 'eval' is not defined"),
        ("9 ** 9999", "ValueError: Exceeds the limit"),
    ],
)
def test_python_refuses(text, message):
    with pytest.raises(ToolError, match=message):
        PythonTool()(text)


def test_python_has_little_memory():
    with pytest.raises(ToolError, match="MemoryError"):
        PythonTool(megabytes=128)("len('a' * 10 ** 9)")


@pytest.mark.parametrize("text", ["9 ** 10 ** 9", "sum(i for i in range(10 ** 12))"])
def test_python_has_little_time(text):
    with pytest.raises(ToolError, match="not done after 1 seconds"):  # without a limit it would not end
        PythonTool(seconds=1)(text)


def test_python_sees_no_environment(monkeypatch):
    """The child is replaced by one that prints its environment; the control inherits the parent's."""
    tell = "import json, os; print(json.dumps([True, json.dumps(dict(os.environ))]))"
    monkeypatch.setattr(python_tool, "CHILD", tell)
    monkeypatch.setenv("SECRET_KEY", "sk-secret")
    assert json.loads(PythonTool()("1")).keys() <= {"LC_CTYPE"}  # Python itself may set it
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, env, **more: run(*words, **more))
    assert json.loads(PythonTool()("1"))["SECRET_KEY"] == "sk-secret"


def test_python_limits_are_positive():
    with pytest.raises(ValueError, match="limits of at least 1"):
        PythonTool(seconds=0)
