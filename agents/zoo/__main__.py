"""rl_zoo3 with the algorithms of textenv, started as a module."""

from .main import main

if __name__ == "__main__":
    main()
