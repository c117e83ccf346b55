"""What a model wrote, made harmless for a terminal."""


def printable(text: str) -> str:
    r"""Return a text whose control characters are shown, not obeyed: a model may write escape codes.

    Lines stay lines; a tab, a carriage return and what turns the direction of writing are shown as Python writes them.

    Example:
        >>> printable("gr\x1b[2Jeat\nfilm")
        'gr\\x1b[2Jeat\nfilm'
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
