"""What a configuration may import, read and write: it may be a stranger's, so that only the command line says more."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

OWN = ("textenv", "agents")
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", flags=re.ASCII)


class Trust(NamedTuple):
    """What the command line, and nothing else, allows.

    Args:
        modules: Modules that a configuration may import beside our own.
        remote_code: Whether a model's own code may run.
        variables: Environment variables whose value a configuration may send.
    """

    modules: Collection[str] = ()
    remote_code: bool = False
    variables: Collection[str] = ()


class Kind(NamedTuple):
    """What is asked for where a name stands.

    Args:
        name: "reward", "metric", ...
        what: What a class must be for it, as the end of an error's sentence.
        fits: Whether a class is one.
    """

    name: str
    what: str
    fits: Callable[[type], bool]


_trust: ContextVar[Trust | None] = ContextVar("trust", default=None)


@contextmanager
def only_with(trust: Trust) -> Iterator[None]:
    """Within, what is built is built for a configuration: its names, variables and paths are looked at.

    Example:
        >>> from textenv.rewards import make_reward
        >>> with only_with(Trust()):
        ...     make_reward("os:getcwd")
        Traceback (most recent call last):
        ValueError: Expected a configuration that imports textenv and agents only, got 'os:getcwd': if you trust it, \
add --allow os to the command.
    """
    token = _trust.set(trust)
    try:
        yield
    finally:
        _trust.reset(token)


def current_trust() -> Trust | None:
    """Return what is allowed to the configuration that is being built; None where there is none, as in Python code."""
    return _trust.get()


def find_class(path: Any, kind: Kind, trust: Trust) -> type:
    """Import the class of a "module:Class" that stands in a configuration.

    It must be defined there, and be of the kind that is asked for: a function, or what a module has imported from
    elsewhere, may do anything.

    Raises:
        ValueError: If its module may not be imported, or it is no such class.
    """
    if not isinstance(path, str) or PATH.fullmatch(path) is None:
        raise ValueError(f"Expected the name of a {kind.name}, or module:Class, got {path!r:.80}.")
    module, _, name = path.partition(":")
    root = module.partition(".")[0]
    if root not in (*OWN, *trust.modules):
        raise ValueError(
            f"Expected a configuration that imports {' and '.join(OWN)} only, got {path!r}: if you trust it, add "
            f"--allow {root} to the command."
        )
    if root in trust.modules:
        _look_here()
    try:
        found = vars(import_module(module)).get(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # what the module itself imports
        raise ValueError(f"Expected {path!r} to be there, got: {error}.") from error
    except SystemExit as error:
        raise ValueError(f"Expected a module to import, got {module}, which ends the process ({error!r}).") from error
    if found is None:
        raise ValueError(f"Expected {path!r} to be there, got a module without it.")
    if not isinstance(found, type) or found.__module__ != module:
        what = f"one of {found.__module__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ValueError(f"Expected {kind.what}, that {module} defines, got {path!r}, {what}.")
    if inspect.isabstract(found) or vars(found).get("_is_protocol") or not kind.fits(found):
        raise ValueError(f"Expected {kind.what} at {path!r}, as a {kind.name} is, got another class.")
    return found


def is_called_with(*names: str, method: str = "__call__") -> Callable[[type], bool]:
    """Return what says whether a class has a method with arguments of these names.

    Example:
        >>> class Polite:
        ...     def __call__(self, prompt, preds, done): ...
        >>> is_called_with("prompt", "preds", "done")(Polite), is_called_with("prompt", "preds")(Polite)
        (True, False)
    """

    def fits(found: type) -> bool:
        call = getattr(found, method, None)
        if not inspect.isfunction(call):  # a class without one has that of its metaclass
            return False
        parameters = list(inspect.signature(call).parameters.values())[1:]
        given = [one.name.lstrip("_") for one in parameters if one.default is one.empty and one.kind < one.KEYWORD_ONLY]
        return given == list(names)

    return fits


def _look_here() -> None:
    """Have modules looked for in the current folder as well, last of all: those that a user allows by name."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def check_variable(name: str) -> None:
    """Raise ValueError where a configuration would send an environment variable that the command line has not named."""
    trust = current_trust()
    if trust is not None and name not in trust.variables:
        raise ValueError(
            f"Expected environment variables that the command allows, got {name!r} in the configuration: if it may be "
            f"sent to the address that stands there, add --allow_env {name} to the command."
        )


def check_written(path: str | PathLike[str], suffix: str = "") -> None:
    """Raise ValueError where a configuration would have something written that is not below the current folder.

    Args:
        path: Where to.
        suffix: How the name must end.
    """
    here = Path.cwd().resolve()
    if current_trust() is not None and not (
        Path(path).resolve().is_relative_to(here) and Path(path).resolve() != here and str(path).endswith(suffix)
    ):
        ending = f" with a name in {suffix}" if suffix else ""
        raise ValueError(
            f"Expected a configuration that writes below {here} alone{ending}, got {str(path)!r}: work in the folder "
            "above it."
        )


def runs_remote_code() -> bool:
    """Return whether a model's own code may run: only where the command line has said so."""
    trust = current_trust()
    return trust is not None and trust.remote_code
