"""The description of one verb of the command: its help, its arguments and the function that does its work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """One verb of the command.

    Args:
        does: The description for its line in `textenv --help`.
        usage: Its arguments, for the first line of its own help.
        config: The dataclass of the arguments that a configuration file may set, too; None for none.
        options: The dataclass of the arguments that only the command line sets; None for none.
        function: The function that does the work, as "module:function", which loads torch when it is imported.
        read: A function from the verb's name and the words after it to the arguments of `function`.
    """

    does: str
    usage: str
    config: Any
    options: Any
    function: str
    read: Callable[[str, list[str]], tuple[Any, ...]]
