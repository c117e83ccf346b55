"""Packages that an extra of textenv brings: what is said where one of them is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class MissingExtraError(ImportError):
    """A package is not installed that an extra of textenv brings; the message says which, and how to install it."""


@contextmanager
def needs(extra: str, package: str, feature: str) -> Iterator[None]:
    """Name the extra where an import within fails.

    Args:
        extra: The extra, as `setup.cfg` calls it.
        package: What is imported.
        feature: What needs it.

    Raises:
        MissingExtraError: If what stands within raises ImportError.

    Example:
        >>> with needs("plot", "matplotlib", "the curves"):
        ...     raise ImportError("No module named 'matplotlib'")
        Traceback (most recent call last):
            ...
        textenv.extras.MissingExtraError: Expected matplotlib for the curves, got No module named 'matplotlib': pip \
install "textenv[plot]".
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(_words(extra, package, feature, str(error).strip())) from error


def check_extra(extra: str, package: str, feature: str) -> None:
    """Name the extra where a package is not installed, without importing it: before the work, not behind it.

    Args:
        extra: The extra, as `setup.cfg` calls it.
        package: What is looked for.
        feature: What needs it.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtraError(_words(extra, package, feature, "none"))


def _words(extra: str, package: str, feature: str, found: str) -> str:
    # In double quotes: the brackets alone are a pattern of zsh and of PowerShell.
    return f'Expected {package} for {feature}, got {found}: pip install "textenv[{extra}]".'
