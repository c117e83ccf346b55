"""Model output made safe to print in a terminal."""


def printable(text: str) -> str:
    r"""Return the text with its control characters escaped, since a model may write terminal escape codes.

    Newlines are kept. Tabs, carriage returns and characters that change the writing direction appear as Python's
    `repr` writes them.

    Example:
        >>> printable("gr\x1b[2Jeat\nfilm")
        'gr\\x1b[2Jeat\nfilm'
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
