"""Tools: a turn may call a function, whose result is observed, before it plays."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from textenv.adapters.game import Game


class ToolError(ValueError):
    """A tool cannot do what it was called with; the policy observes the message."""


class Tool(Protocol):
    """A function of one text, as `Calculator` and `textenv.adapters.python_tool.PythonTool` are."""

    def __call__(self, text: str) -> str:
        """Return the result, the same for the same text; raise `ToolError` where there is none."""


class ToolGame:
    """A game in which a turn may be a call: `<name>text</name>`, the first one in it counts.

    The call's result is the reply, `<result>text</result>`; it earns nothing, and the game within does not notice. What
    the turn has besides the call is not played. A call may lack its end tag where the turn ends with it, so that the
    tag can be one of the env's stop strings. How many calls there may be is bounded by the env's room alone.

    Args:
        game: Makes the game within.
        tools: The functions by name. Their `ToolError` is observed as `error: message`; any other ends training.
        reply: How a result is written, with `{}` in its place.

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
        """Begin the game within."""
        return self.game.reset(seed=seed)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Call a tool, or play the game within."""
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
LARGEST = 10**15  # of every number on the way
LARGEST_EXPONENT = 50
GRAMMAR = "expected numbers with + - * / // % ** and brackets"
NESTED = "expected fewer brackets and signs within each other"
RANGE = "expected real numbers up to 1e15"


@dataclass(frozen=True)
class Calculator:
    """Numbers with `+ - * / // % **` and brackets, as Python has them; nothing is evaluated but these.

    Args:
        max_chars: The longest expression.

    Example:
        >>> Calculator()("(2 + 3) * 4 / 5")
        '4'
    """

    max_chars: int = 100

    def __call__(self, text: str) -> str:
        """Return the number.

        Raises:
            ToolError: If the text is no such expression, too long, or a number in it is too large.
        """
        if len(text) > self.max_chars:
            raise ToolError(f"expected at most {self.max_chars} characters")
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError) as error:  # ValueError: null bytes in Python 3.10, and lone surrogates
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
