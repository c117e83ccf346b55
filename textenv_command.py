"""Where the command `textenv` starts: it imports `agents` once it is certain whose that is.

openai-agents, too, installs a package of that name, and whichever comes later overwrites files of the other: even where
ours came last, its folder `agents/memory/` hides our `agents/memory.py`. This is a module of its own, since `agents`
may be the other's, and `import textenv` would take as long as all the rest of `textenv --help`.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

MISSING = 6  # the exit code that is agents.refusal.Exit.MISSING where agents is ours


def check_agents() -> None:
    """Raise ImportError, with the cure, where the package `agents` is not that of textenv, or not its alone."""
    # The files that an installer wrote; names are read of those alone that have some here, which keeps it cheap.
    claiming = [one for one in distributions() if "\nagents/" in f"\n{one.read_text('RECORD') or ''}"]
    others = {one.metadata["Name"] for one in claiming} - {"textenv"}
    if others:
        raise ImportError(
            f"Expected the package `agents` to be textenv's alone, got one of {' and '.join(sorted(others))} besides, "
            "and they overwrite each other: install textenv into an environment of its own (python3 -m venv DIR)."
        )
    ours, found = _folder("textenv").with_name("agents"), _folder("agents")
    if found != ours:
        raise ImportError(
            f"Expected the package `agents` to be textenv's, {ours}, got {found}: install textenv into an environment "
            "of its own (python3 -m venv DIR), or take the other off PYTHONPATH."
        )


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise ImportError(f"Expected the package `{package}` to be installed, got none: install textenv again.")
    places = spec.submodule_search_locations or [spec.origin or ""]  # a package, or a module of that name
    return Path(next(iter(places))).resolve()


def main() -> int:
    """Run the command, and return its exit code."""
    try:
        check_agents()
    except ImportError as error:
        print(f"textenv: {error}", file=sys.stderr)
        return MISSING
    from agents.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
