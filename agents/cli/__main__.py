"""The start of `agents.cli` as a module, which is the command `textenv`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
