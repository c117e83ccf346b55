"""The start of `agents.zoo` as a module: rl_zoo3 with the algorithms of textenv."""

from .main import main

if __name__ == "__main__":
    main()
