"""The package's description on PyPI: README.md, with links that hold there. All other metadata is in setup.cfg.

README.md links to files of the repository. The workflow that publishes a release knows their address, and sets
FILES_URL. A build without it leaves pictures out, and turns a link into its words and the name of the file.
"""

import os
import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")


def description(readme: str, files: str = "") -> str:
    """Return README.md as PyPI shall show it.

    Args:
        readme: The text of README.md.
        files: The address under which the repository's files are, such as "https://host/owner/name/blob/v1.0"; "" where
            there is none.
    """

    def moved(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if files:
            return f"{picture}[{words}]({files}/{path}{'?raw=true' if picture else ''})"
        return "" if picture else f"`{path}`" if words == path else f"{words} (`{path}`)"

    return LINK.sub(moved, readme)


setup(
    long_description=description(
        Path(__file__).with_name("README.md").read_text(encoding="utf-8"), os.environ.get("FILES_URL", "")
    )
)
