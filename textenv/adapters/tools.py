"""Tools: functions that the policy may call in a turn, to observe their results."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from textenv.adapters.game import Game


class ToolError(ValueError):
    """A tool cannot handle its argument; the policy observes the message."""


class Tool(Protocol):
    """A function of one text, such as `Calculator` or `textenv.adapters.python_tool.PythonTool`."""

    def __call__(self, text: str) -> str:
        """Return the result, always the same for the same text.

        Raises:
            ToolError: If there is no result; the policy observes the message.
        """


class ToolGame:
    """A game around another one, in which a turn may call a tool, `<name>argument</name>`, instead of playing.

    The first call in a turn counts; the rest of its text is not played. The reply is the tool's result,
    `<result>text</result>`, which earns 0, and the inner game is not stepped. The end tag may be missing at the end of
    a turn, so that it can be one of the env's stop strings. Only the env's `max_new_tokens` limits the number of calls.

    Args:
        game: A function that makes the inner game.
        tools: The functions by name. The policy observes a `ToolError` as `error: message`; other errors end training.
        reply: The form of a reply, with `{}` in place of the result.

    Raises:
        ValueError: If there is no tool, or `reply` lacks `{}`.

    Example:
        >>> class Sum:
        ...     def reset(self, *, seed):
        ...         return "12 * 34 = ?", {}
        ...     def step(self, text):
        ...         return "", float(text == "408"), True, False, {}
        >>> game = ToolGame(Sum, {"calc": Calculator()})
        >>> _ = game.reset(seed=0)
        >>> game.step("<calc>12 * 34</calc>")[:3]
        ('<result>408</result>', 0.0, False)
        >>> game.step("408")[:3]
        ('', 1.0, True)
    """

    def __init__(self, game: Callable[[], Game], tools: Mapping[str, Tool], reply: str = "<result>{}</result>") -> None:
        if not tools:
            raise ValueError("Expected at least one tool, got none.")
        if "{}" not in reply:
            raise ValueError(f"Expected `reply` to have {{}} in the result's place, got {reply!r}.")
        self.game = game()
        self.tools = dict(tools)
        self.reply = reply
        names = "|".join(re.escape(name) for name in self.tools)
        self._call = re.compile(rf"<({names})>(.*?)(?:</\1>|\Z)", re.DOTALL)

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin the inner game."""
        return self.game.reset(seed=seed)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Call a tool, or play a turn of the inner game; return text, reward, terminated, truncated and info."""
        call = self._call.search(text)
        if call is None:
            return self.game.step(text)
        name, argument = call.groups()
        try:
            result = self.tools[name](argument.strip())
        except ToolError as error:
            result = f"error: {error}"
        return self.reply.replace("{}", result), 0.0, False, False, {"tool": name}


OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
LARGEST = 10**15  # the bound of every intermediate result; floats hold whole numbers up to this size exactly
LARGEST_EXPONENT = 50  # enough for 2 ** 49, and small enough that no power takes long
GRAMMAR = "expected numbers with + - * / // % ** and brackets"
NESTED = "expected fewer brackets and signs within each other"
RANGE = "expected real numbers up to 1e15"


@dataclass(frozen=True)
class Calculator:
    """A tool that evaluates numbers with `+ - * / // % **` and brackets, by Python's rules, and nothing else.

    Args:
        max_chars: The most characters of an expression.

    Example:
        >>> Calculator()("(2 + 3) * 4 / 5")
        '4'
    """

    max_chars: int = 100

    def __call__(self, text: str) -> str:
        """Return the expression's value, with up to 10 significant digits if it is not a whole number.

        Raises:
            ToolError: If the text is not such an expression, is too long, or has a result over 1e15 on the way.
        """
        if len(text) > self.max_chars:
            raise ToolError(f"expected at most {self.max_chars} characters")
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError) as error:  # ValueError: a lone surrogate
            raise ToolError(GRAMMAR) from error
        except (RecursionError, MemoryError) as error:  # the parser's stack is full
            raise ToolError(NESTED) from error
        try:
            value = _value(tree.body)
        except ZeroDivisionError as error:
            raise ToolError("division by zero") from error
        except RecursionError as error:
            raise ToolError(NESTED) from error
        except OverflowError as error:
            raise ToolError(RANGE) from error
        return format(value, "d" if isinstance(value, int) else ".10g")


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return _bounded(OPERATORS[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
            raise ToolError(f"expected exponents up to {LARGEST_EXPONENT}")
        return _bounded(OPERATORS[type(node.op)](left, right))
    raise ToolError(GRAMMAR)


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ToolError(RANGE)
    return value
