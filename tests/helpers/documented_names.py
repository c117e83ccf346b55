"""The names of Python that a page has between backticks, and where the page says that they come from."""

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
    """The names in a page's text: classes, what is called, and dotted names of the packages; no file, no keyword."""
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
    """What the page's Python imports: each name with the module it is taken from."""
    blocks = [block for language, block in FENCE.findall(text) if language == "python"]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module, alias.name) for node in nodes for alias in node.names}


def is_there(dotted):
    """Whether a dotted name is a module, or is found in one."""
    path = dotted.split(".")
    for n in range(len(path), 0, -1):
        try:
            found = importlib.import_module(".".join(path[:n]))
        except ModuleNotFoundError:
            continue
        for name in path[n:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def unknown_names(text, own=()):
    """The names that neither the packages' roots nor an import of the page have, but for those that a reader gives."""
    imports = imported_by(text)
    roots = {*agents.__all__, *textenv.__all__}

    def is_known(name):
        if name in imports or "." in name:
            return is_there(".".join(imports.get(name, [name])))
        return name in roots

    return sorted(name for name in names_of(text) - set(own) if not is_known(name))
