"""`python -m agents.cli`: the command `textenv`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
