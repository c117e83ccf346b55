"""The check that the installed package `agents` is textenv's.

openai-agents also installs a package named `agents`, and pip lets whichever is installed later overwrite files of the
other. Even if ours is the later one, files of both are mixed in `agents/models/`, a folder that both have. The check is
a module of its own: inside `agents` it could be overwritten, and `import textenv` would double the time of
`textenv --help`.
"""

from __future__ import annotations

from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path


def check_agents() -> None:
    """Check that the package `agents` belongs to textenv alone.

    Raises:
        ImportError: If it does not; the message has the cure.
    """
    # The file RECORD lists a distribution's files. Its name is in another file, which only the owners have read.
    owners = [owner for owner in distributions() if "\nagents/" in f"\n{owner.read_text('RECORD') or ''}"]
    others = {owner.metadata["Name"] for owner in owners} - {"textenv"}
    if others:
        raise ImportError(
            f"Expected the package `agents` to be textenv's alone, got one of {' and '.join(sorted(others))} besides, "
            "and they overwrite each other: install textenv into an environment of its own (python3 -m venv DIR)."
        )
    ours, actual = _folder("textenv").with_name("agents"), _folder("agents")
    if actual != ours:
        raise ImportError(
            f"Expected the package `agents` to be textenv's, {ours}, got {actual}: install textenv into an environment "
            "of its own (python3 -m venv DIR), or take the other off PYTHONPATH."
        )


def _folder(package: str) -> Path:
    """Return the folder from which Python would import a package, without importing it."""
    spec = find_spec(package)
    if spec is None:
        raise ImportError(f"Expected the package `{package}` to be installed, got none: install textenv again.")
    paths = spec.submodule_search_locations or [spec.origin or ""]  # the folder of a package, or the file of a module
    return Path(next(iter(paths))).resolve()
