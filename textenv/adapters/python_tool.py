"""The tool that evaluates Python expressions, in a child process with limits on time, memory and names."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from textenv.adapters.tools import ToolError

# The child's program. It lists the allowed names and attributes rather than the forbidden ones, so that imports, files,
# frames and classes are out of reach. The resource limits are set first and hold whatever the expression does.
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
    answer = [True, str(eval(compile(tree, "expression", "eval"), {"__builtins__": {}, **NAMES}))]
except BaseException as error:
    answer = [False, type(error).__name__ + ": " + str(error)]
print(json.dumps([answer[0], answer[1][:max_chars]]))
"""


@dataclass(frozen=True)
class PythonTool:
    """A tool that evaluates a Python expression, such as `sum(range(10))`, and returns its value as `str` writes it.

    The expression runs in a fresh interpreter (about 20 ms) without site packages and environment variables, which can
    neither read nor write files, with limits on processor time and memory. It may use `math`, the builtins without side
    effects, the attributes of `math`, and some methods of strings and dicts. This stops what a policy stumbles upon. It
    is no sandbox against an adversary: run untrusted models in a container.

    It needs the module `resource`, which only Linux and macOS have.

    Args:
        seconds: The limit of processor time; after one second more of wall clock the child is killed.
        megabytes: The limit of memory, including about 40 of the interpreter itself.
        max_chars: The number of characters of a result that are kept.

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
            ToolError: If the expression raised an exception or reached a limit; the message says which.
            RuntimeError: If the child process itself failed.
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
        if child.returncode < 0:  # killed by a signal, SIGXCPU or SIGKILL, at the limit of processor time
            raise ToolError(f"not done after {self.seconds} seconds")
        if child.returncode > 0:
            raise RuntimeError(f"The child process of PythonTool failed: {child.stderr[-400:]}")
        is_value, result = json.loads(child.stdout)
        if not _is_text(result):
            raise ToolError("expected a result that UTF-8 can write, got a lone surrogate")
        if not is_value:
            raise ToolError(result)
        return result


def _is_text(text: str) -> bool:
    """Return whether a tokenizer can encode a text, which it cannot if there is a lone surrogate in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
