"""Text that others wrote, made harmless for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return a text whose control characters are shown, not obeyed.

    Example:
        >>> print(printable(chr(27) + "[2Jgone"))
        \x1b[2Jgone
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
