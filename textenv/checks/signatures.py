"""Checks of named arguments against the signature of a class or function."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from inspect import Parameter
from typing import Any


def check_arguments(
    function: Callable[..., Any], arguments: Collection[str], name: str, without: Collection[str] = ()
) -> None:
    """Refuse arguments that a class or function does not have, and the lack of those that it requires.

    Args:
        function: The class or function. Where a class takes `**kwargs`, the arguments of its base classes count, too.
        arguments: The names of the arguments that the caller passes.
        name: The class or function as errors name it.
        without: Arguments of the function that the caller may not pass.

    Raises:
        ValueError: If an argument is unknown or missing; the message lists the known ones and suggests the nearest.

    Example:
        >>> from textenv.rewards.rules import Length
        >>> check_arguments(Length, {"targe"}, "the reward 'length'")
        Traceback (most recent call last):
        ValueError: Expected arguments among target, unit for the reward 'length', got 'targe': did you mean 'target'?
    """
    parameters, takes_any = _parameters_of(function)
    known = [parameter for parameter in parameters if parameter not in without]
    for argument in arguments:
        if argument not in known and (argument in without or not takes_any):
            expected = f"arguments among {', '.join(known)}" if known else "no arguments"
            raise ValueError(f"Expected {expected} for {name}, got {argument!r}{nearest(argument, known)}")
    required = [parameter for parameter in known if parameters[parameter].default is Parameter.empty]
    missing = [parameter for parameter in required if parameter not in arguments]
    if missing:
        got = ", ".join(sorted(map(str, arguments))) or "none"
        raise ValueError(f"Expected the argument {missing[0]!r} for {name}, got {got}.")


def needed(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that have no default."""
    return [name for name, parameter in _parameters_of(function)[0].items() if parameter.default is Parameter.empty]


def _parameters_of(function: Callable[..., Any]) -> tuple[dict[str, Parameter], bool]:
    """Return the parameters that can be passed by name, and whether the function may take any other name as well."""
    if not isinstance(function, type) or function.__init__ is object.__init__:  # type: ignore[misc]
        try:
            return _by_name(inspect.signature(function).parameters.values())
        except ValueError:  # compiled functions may have no signature
            return {}, True
    merged: dict[str, Parameter] = {}
    initialisers = [vars(base)["__init__"] for base in function.__mro__[:-1] if "__init__" in vars(base)]
    for i, initialiser in enumerate(initialisers):
        parameters, takes_any = _by_name(list(inspect.signature(initialiser).parameters.values())[1:])  # without self
        if i > 0:  # the subclass may fill in an argument that its base class requires, so it counts as optional
            parameters = {name: parameter.replace(default=None) for name, parameter in parameters.items()}
        merged = {**parameters, **merged}
        if not takes_any:
            return merged, False
    return merged, True


def _by_name(parameters: Iterable[Parameter]) -> tuple[dict[str, Parameter], bool]:
    """Return the parameters that can be passed by name, and whether `**kwargs` is among the parameters."""
    listed = list(parameters)
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in listed)
    return {parameter.name: parameter for parameter in listed if parameter.kind in kinds}, takes_any


def nearest(name: object, known: Collection[str]) -> str:
    """Return the end of an error message: a suggestion of the known name that is most similar, or "." if none is.

    Example:
        >>> nearest("trian", ["sft", "train"])
        ": did you mean 'train'?"
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)  # "lk" for "kl" scores 0.5
    return f": did you mean {near[0]!r}?" if near else "."
