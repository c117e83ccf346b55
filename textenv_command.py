"""The start of the command `textenv`: it checks that the package `agents` is textenv's, and then imports it."""

from __future__ import annotations

import sys

from textenv_agents import check_agents

MISSING = 6  # the value of `agents.errors.Exit.MISSING`, which cannot be imported before the check


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
