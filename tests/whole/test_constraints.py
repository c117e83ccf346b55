"""The constraints files: they pin all that CI installs, and differ only where gem-llm needs older versions."""

import configparser
import re

from tests.helpers.house import ROOT

# Packages of which gem-llm 0.1.0 pins older versions.
OLDER = {"nltk", "reasoning-gym"}
# The extra without pins: its library and that of `verifiers` need versions of mcp that exclude each other.
OPEN = {"openenv"}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines)
    pinned = {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert len(pinned) == len(lines)
    return pinned


def required():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    parts = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {
        extra: {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines.split("\n") if line and line[0] != "#"}
        for extra, lines in parts.items()
    }


def test_all_that_is_required_is_pinned():
    for extra, names in required().items():
        known = pins("constraints-gem.txt" if extra == "gem" else "constraints.txt")
        assert extra in OPEN or names - known.keys() <= {"textenv"}, extra


def test_gem_has_the_same_but_for_what_it_pins():
    gem, most = pins("constraints-gem.txt"), pins("constraints.txt")
    assert {name for name in gem.keys() & most.keys() if gem[name] != most[name]} == OLDER
    assert "mcp" not in most


def test_floors_admit_the_pins():
    """pip would refuse a pin below its floor."""
    text = (ROOT / "setup.cfg").read_text()
    most = {**pins("constraints-gem.txt"), **pins("constraints.txt")}
    floors = re.findall(r"^    ([\w.-]+)>=([\d.]+)", text, flags=re.MULTILINE)
    assert len(floors) > 20

    def numbers(version):
        return [int(part) for part in re.findall(r"\d+", version)]

    for name, floor in floors:
        assert canonical(name) in OPEN or numbers(floor) <= numbers(most[canonical(name)]), name
