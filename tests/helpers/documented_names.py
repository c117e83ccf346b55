"""The Python names that a page has between backticks, and the modules that the page imports them from."""

import ast
import builtins
import importlib
import re

import agents
import textenv
from tests.helpers.documented import FENCE

SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PACKAGES = ("agents", "textenv", "gymnasium")
DOTTED = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
FILES = (".py", ".md", ".yml", ".png", ".json", ".jsonl")


def names_of(text):
    """Return the names in a page's text: classes, called functions, and dotted names of the packages."""
    found = set()
    for span in SPAN.findall(FENCE.sub("", text)):
        if span.endswith(FILES):
            continue
        try:
            tree = ast.parse(span.replace("\\|", "|"))
        except SyntaxError:
            continue
        found.update(DOTTED.findall(span))
        called = {node.func.id for node in ast.walk(tree) if is_name(getattr(node, "func", None))}
        found |= {node.id for node in ast.walk(tree) if is_name(node) and (node.id in called or is_class(node.id))}
    return found - set(dir(builtins))


def is_name(node):
    return isinstance(node, ast.Name)


def is_class(name):
    return re.fullmatch(r"[A-Z]+[a-z]\w*|[A-Z]\d?[A-Z]", name) is not None


def imported_by(text):
    """Return the imports of a page's Python blocks: (module, name) by the local name."""
    blocks = [block for language, block in FENCE.findall(text) if language == "python"]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module, alias.name) for node in nodes for alias in node.names}


def is_there(dotted):
    """Return whether a dotted name is a module, or an attribute of one."""
    path = dotted.split(".")
    for n in range(len(path), 0, -1):
        try:
            value = importlib.import_module(".".join(path[:n]))
        except ModuleNotFoundError:
            continue
        for name in path[n:]:
            if not hasattr(value, name):
                return False
            value = getattr(value, name)
        return True
    return False


def unknown_names(text, own=()):
    """Return the names that neither the packages' roots nor the page's imports define, without the reader's own."""
    imports = imported_by(text)
    roots = {*agents.__all__, *textenv.__all__}

    def is_known(name):
        if name in imports or "." in name:
            return is_there(".".join(imports.get(name, [name])))
        return name in roots

    return sorted(name for name in names_of(text) - set(own) if not is_known(name))
