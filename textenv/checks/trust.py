"""Limits on configurations that strangers may have written: only the command line lets them import or send more."""

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
    """The permissions that the command line, and nothing else, gives to a configuration.

    Args:
        modules: The modules that the configuration may import in addition to `textenv` and `agents`.
        remote_code: Whether a model's own code may run.
        variables: The environment variables whose values the configuration may send.
    """

    modules: Collection[str] = ()
    remote_code: bool = False
    variables: Collection[str] = ()


class Kind(NamedTuple):
    """The kind of object that a configuration names at one place.

    Args:
        name: The kind: "reward", "metric", ...
        what: The requirement on such a class, as errors print it after "Expected".
        fits: A function that returns whether a class is of this kind.
    """

    name: str
    what: str
    fits: Callable[[type], bool]


# A context variable, so that one thread's configuration does not limit the Python code of another.
_trust: ContextVar[Trust | None] = ContextVar("trust", default=None)


@contextmanager
def only_with(trust: Trust) -> Iterator[None]:
    """Limit the names, variables and paths in a block that builds objects from a configuration.

    Args:
        trust: The permissions that the command line gives.

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
    """Return the permissions inside an `only_with` block; None outside of one, where Python code is trusted."""
    return _trust.get()


def find_class(path: Any, kind: Kind, trust: Trust) -> type:
    """Import the class that a configuration names as "module:Class".

    The module must define the class itself, and the class must be of the expected kind: a call of a function, or of an
    object that the module imported from elsewhere, might do anything.

    Args:
        path: The name, "module:Class".
        kind: The kind of class that is expected.
        trust: The permissions that the command line gives.

    Raises:
        ValueError: If the module may not be imported, or the class is missing or of another kind.
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
    if root in trust.modules:  # our own packages are never looked for in the current folder
        _add_current_folder()
    try:
        imported = vars(import_module(module)).get(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, but one of its own imports is not
        raise ValueError(f"Expected {path!r} to be there, got: {error}.") from error
    except SystemExit as error:
        raise ValueError(f"Expected a module to import, got {module}, which ends the process ({error!r}).") from error
    if imported is None:
        raise ValueError(f"Expected {path!r} to be there, got a module without it.")
    if not isinstance(imported, type) or imported.__module__ != module:
        got = f"one of {imported.__module__}" if isinstance(imported, type) else f"a {type(imported).__name__}"
        raise ValueError(f"Expected {kind.what}, that {module} defines, got {path!r}, {got}.")
    # typing.Protocol sets `_is_protocol` on the protocols themselves, and to False on classes that implement one.
    if inspect.isabstract(imported) or vars(imported).get("_is_protocol") or not kind.fits(imported):
        raise ValueError(f"Expected {kind.what} at {path!r}, as a {kind.name} is, got another class.")
    return imported


def is_called_with(*names: str, method: str = "__call__") -> Callable[[type], bool]:
    """Return a function that checks whether the required arguments of a class's method have exactly these names.

    Args:
        *names: The names after `self`, without leading underscores.
        method: The method's name.

    Example:
        >>> class Polite:
        ...     def __call__(self, prompt, preds, done): ...
        >>> is_called_with("prompt", "preds", "done")(Polite), is_called_with("prompt", "preds")(Polite)
        (True, False)
    """

    def fits(cls: type) -> bool:
        call = getattr(cls, method, None)
        if not inspect.isfunction(call):  # getattr falls back to the metaclass, whose `__call__` makes instances
            return False
        parameters = list(inspect.signature(call).parameters.values())[1:]
        required = [p.name.lstrip("_") for p in parameters if p.default is p.empty and p.kind < p.KEYWORD_ONLY]
        return required == list(names)

    return fits


def _add_current_folder() -> None:
    """Let modules that a user allowed by name be imported from the current folder, after all other folders."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def check_variable(name: str) -> None:
    """Raise ValueError if a configuration would send an environment variable that the command line does not allow."""
    trust = current_trust()
    if trust is not None and name not in trust.variables:
        raise ValueError(
            f"Expected environment variables that the command allows, got {name!r} in the configuration: if it may be "
            f"sent to the address that stands there, add --allow_env {name} to the command."
        )


def check_written(path: str | PathLike[str], suffix: str = "") -> None:
    """Raise ValueError if a configuration would write a file outside the current folder.

    Args:
        path: The file or folder to be written.
        suffix: The ending that its name must have.
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
    """Return whether a model's own code may run, which only the command line can allow."""
    trust = current_trust()
    return trust is not None and trust.remote_code
