"""A Python expression as a tool: evaluated in a child process with little time, little memory and few names."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from textenv.adapters.tools import ToolError

# Run by the child. Names and attributes are listed rather than excluded: what is not here cannot be reached, so neither
# imports nor files, frames or classes can. The limits hold whatever the expression does.
CHILD = """
import ast, json, math, resource, sys
seconds, megabytes, max_chars = map(int, sys.argv[1:])
limits = {"CPU": seconds, "AS": megabytes << 20, "FSIZE": 0, "CORE": 0, "NOFILE": 3}
source = sys.stdin.read()
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
NAMES = {f.__name__: f for f in (
    abs, all, any, bin, bool, chr, dict, divmod, enumerate, filter, float, hex, int, len, list, map, max, min, ord, pow,
    range, repr, reversed, round, set, sorted, str, sum, tuple, zip)} | {"math": math}
METHODS = set(dir(math)) | {
    "capitalize", "count", "endswith", "find", "get", "index", "isalpha", "isdigit", "items", "join", "keys", "lower",
    "replace", "split", "startswith", "strip", "title", "upper", "values"}
def check(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr not in METHODS or node.attr.startswith("_")):
            raise NameError("no attribute " + node.attr + " here")
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            raise NameError("no name " + node.id + " here")
try:
    tree = ast.parse(source, mode="eval")
    check(tree)
    said = [True, str(eval(compile(tree, "expression", "eval"), {"__builtins__": {}, **NAMES}))]
except BaseException as error:
    said = [False, type(error).__name__ + ": " + str(error)]
print(json.dumps([said[0], said[1][:max_chars]]))
"""


@dataclass(frozen=True)
class PythonTool:
    """A Python expression, such as `sum(range(10))`; its value as `str` writes it is the result.

    It is evaluated in a fresh interpreter (some 20 ms) without site packages and environment variables, that may
    neither write files nor open any, with limits on processor time and memory; of names there are `math` and the
    builtins without side effects, and of attributes those of `math` and some of strings and dicts. That holds back what
    a policy stumbles upon; it is no guarantee against an adversary: run untrusted models in a container.

    Needs the module `resource`, which Linux and macOS have.

    Args:
        seconds: The most processor time, and one more by the clock.
        megabytes: The most memory, the interpreter's own 40 included.
        max_chars: How much of a result is kept.

    Example:
        >>> PythonTool()("max(len(word) for word in 'how long is this'.split())")
        '4'
    """

    seconds: int = 2
    megabytes: int = 256
    max_chars: int = 200

    def __post_init__(self) -> None:
        if min(self.seconds, self.megabytes, self.max_chars) < 1:
            raise ValueError(f"Expected limits of at least 1, got {self}.")

    def __call__(self, text: str) -> str:
        """Return the value of an expression.

        Raises:
            ToolError: With the exception that it raised, or the limit that it reached.
        """
        if not _is_text(text):
            raise ToolError("expected a text that UTF-8 can write, got a lone surrogate")
        limits = [str(limit) for limit in (self.seconds, self.megabytes, self.max_chars)]
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-S", "-c", CHILD, *limits],
                input=text,
                capture_output=True,
                text=True,
                timeout=self.seconds + 1,
                cwd="/",
                env={},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"not done after {self.seconds} seconds") from error
        if child.returncode < 0:  # a signal: the limit of processor time
            raise ToolError(f"not done after {self.seconds} seconds")
        if child.returncode > 0:
            raise RuntimeError(f"The child process of PythonTool failed: {child.stderr[-400:]}")
        is_value, said = json.loads(child.stdout)
        if not _is_text(said):
            raise ToolError("expected a result that UTF-8 can write, got a lone surrogate")
        if not is_value:
            raise ToolError(said)
        return said


def _is_text(text: str) -> bool:
    """Return whether a tokenizer can read a text: half of a pair of UTF-16 is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
