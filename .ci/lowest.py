"""The lowest versions that setup.cfg admits, printed as pip constraints; without torch, whose wheels are large."""

import configparser
import re
import sys
from pathlib import Path


def lowest(text: str) -> list[str]:
    """Return a pin for each requirement of the package and of the extras that `dev` brings.

    Raises:
        ValueError: If one of them has no floor.
    """
    config = configparser.ConfigParser()
    config.read_string(text)
    extras = config["options.extras_require"]
    names = re.search(r"textenv\[(.*)\]", extras["dev"])[1].split(",")
    lines = "\n".join([config["options"]["install_requires"], *(extras[name] for name in names)]).split("\n")
    pins = []
    for line in lines:
        if not line or line.startswith(("#", "torch>")):
            continue
        match = re.match(r"([\w.-]+)>=([\w.]+)", line)
        if match is None:
            raise ValueError(f"Expected a lowest version of each requirement, got {line!r}.")
        pins.append(f"{match[1]}=={match[2]}")
    return pins


if __name__ == "__main__":
    setup = Path(__file__).resolve().parent.parent / "setup.cfg"
    sys.stdout.write("\n".join(lowest(setup.read_text(encoding="utf-8"))) + "\n")
