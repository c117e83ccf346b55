"""The start of `python -m agents.zoo`."""

from .main import main

if __name__ == "__main__":
    main()
