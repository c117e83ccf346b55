"""Whether a class or function takes the arguments that a configuration gives it by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from inspect import Parameter
from typing import Any


def check_arguments(
    function: Callable[..., Any], given: Collection[str], name: str, without: Collection[str] = ()
) -> None:
    """Refuse arguments that a class or function has not, and the lack of those that it needs.

    Args:
        function: The class or function; through `**kwargs` the classes that it is derived from count as well.
        given: The names of the arguments.
        name: What it is called in the error.
        without: Names of its arguments that are not given in this way.

    Raises:
        ValueError: With the names that there are, and the one that is most like the wrong one.

    Example:
        >>> from textenv.rewards.rules import Length
        >>> check_arguments(Length, {"targe"}, "the reward 'length'")
        Traceback (most recent call last):
        ValueError: Expected arguments among target, unit for the reward 'length', got 'targe': did you mean 'target'?
    """
    parameters, is_open = _takes(function)
    known = [one for one in parameters if one not in without]
    for one in given:
        if one not in known and (one in without or not is_open):
            there = f"arguments among {', '.join(known)}" if known else "no arguments"
            raise ValueError(f"Expected {there} for {name}, got {one!r}{nearest(one, known)}")
    missing = [one for one in known if parameters[one].default is Parameter.empty and one not in given]
    if missing:
        raise ValueError(
            f"Expected the argument {missing[0]!r} for {name}, got {', '.join(sorted(map(str, given))) or 'none'}."
        )


def needed(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that have no default."""
    return [name for name, one in _takes(function)[0].items() if one.default is Parameter.empty]


def _takes(function: Callable[..., Any]) -> tuple[dict[str, Parameter], bool]:
    """Return the parameters that can be given by name, and whether there may be others that nothing tells."""
    if not isinstance(function, type) or function.__init__ is object.__init__:  # type: ignore[misc]
        try:
            return _by_name(inspect.signature(function).parameters.values())
        except ValueError:  # compiled, and without a signature
            return {}, True
    found: dict[str, Parameter] = {}
    makers = [vars(base)["__init__"] for base in function.__mro__[:-1] if "__init__" in vars(base)]
    for place, maker in enumerate(makers):
        more, is_open = _by_name(list(inspect.signature(maker).parameters.values())[1:])
        if place:  # what a class fills in for the one above it has no need to be given
            more = {name: one.replace(default=None) for name, one in more.items()}
        found = {**more, **found}
        if not is_open:
            return found, False
    return found, True


def _by_name(parameters: Iterable[Parameter]) -> tuple[dict[str, Parameter], bool]:
    every = list(parameters)
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {one.name: one for one in every if one.kind in kinds}, any(
        one.kind is Parameter.VAR_KEYWORD for one in every
    )


def nearest(name: object, known: Collection[str]) -> str:
    """Return the end of a sentence: the known name that is most like this one, if one is.

    Example:
        >>> nearest("trian", ["sft", "train"])
        ": did you mean 'train'?"
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else "."
