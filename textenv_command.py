"""The start of the command `textenv`: it imports `agents` only after it has checked that the package is textenv's.

openai-agents also installs a package named `agents`, and pip lets the later one overwrite files of the earlier. Even if
ours was the later one, files of both lie in `agents/models/`, a folder that both have. The check has a module of its
own: in `agents` it might be the other's, and `import textenv` takes as long as all the rest of `textenv --help`.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

MISSING = 6  # the same as agents.errors.Exit.MISSING, which cannot be imported before the check


def check_agents() -> None:
    """Check that the package `agents` belongs to textenv, and to nothing else.

    Raises:
        ImportError: If it does not, with the cure.
    """
    # RECORD lists the files of a distribution. Its name costs a second file, which is read for the few that match.
    owners = [owner for owner in distributions() if "\nagents/" in f"\n{owner.read_text('RECORD') or ''}"]
    others = {owner.metadata["Name"] for owner in owners} - {"textenv"}
    if others:
        raise ImportError(
            f"Expected the package `agents` to be textenv's alone, got one of {' and '.join(sorted(others))} besides, "
            "and they overwrite each other: install textenv into an environment of its own (python3 -m venv DIR)."
        )
    ours, first = _folder("textenv").with_name("agents"), _folder("agents")
    if first != ours:
        raise ImportError(
            f"Expected the package `agents` to be textenv's, {ours}, got {first}: install textenv into an environment "
            "of its own (python3 -m venv DIR), or take the other off PYTHONPATH."
        )


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise ImportError(f"Expected the package `{package}` to be installed, got none: install textenv again.")
    paths = spec.submodule_search_locations or [spec.origin or ""]  # the folder of a package, or the file of a module
    return Path(next(iter(paths))).resolve()


def main() -> int:
    """Run the command, and return its exit code."""
    try:
        check_agents()
    except ImportError as error:
        print(f"textenv: {error}", file=sys.stderr)
        return MISSING
    from agents.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
