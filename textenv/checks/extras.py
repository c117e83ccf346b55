"""The error for a missing optional package, which names the extra of textenv that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra of textenv that brings it."""


@contextmanager
def needs(extra: str, package: str, feature: str) -> Iterator[None]:
    """Turn an ImportError inside the block into one that names the extra to install.

    Args:
        extra: The extra's name in `setup.cfg`.
        package: The package that is imported.
        feature: The feature that needs the package.

    Raises:
        MissingExtraError: If the block raises ImportError.

    Example:
        >>> with needs("plot", "matplotlib", "the curves"):
        ...     raise ImportError("No module named 'matplotlib'")
        Traceback (most recent call last):
            ...
        textenv.checks.extras.MissingExtraError: Expected matplotlib for the curves, got No module named 'matplotlib': \
pip install "textenv[plot]".
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(_message(extra, package, feature, str(error).strip())) from error


def check_extra(extra: str, package: str, feature: str) -> None:
    """Check that a package is installed, without importing it, so that a long job fails at its start and not its end.

    Args:
        extra: The extra's name in `setup.cfg`.
        package: The package that will be imported.
        feature: The feature that needs the package.

    Raises:
        MissingExtraError: If the package is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtraError(_message(extra, package, feature, "none"))


def _message(extra: str, package: str, feature: str, reason: str) -> str:
    # The requirement is quoted, since zsh and PowerShell would expand its brackets.
    return f'Expected {package} for {feature}, got {reason}: pip install "textenv[{extra}]".'
