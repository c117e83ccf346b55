"""Model output made safe to print in a terminal and to show on a page."""

import html

# From each character that Markdown takes for markup to its HTML entity, which Markdown leaves alone.
MARKDOWN = {ord(char): f"&#{ord(char)};" for char in "\\`*_[]|"}


def printable(text: str) -> str:
    r"""Return the text with its control characters escaped, since a model may write terminal escape codes.

    Newlines are kept. Tabs, carriage returns and characters that change the writing direction appear as Python's
    `repr` writes them.

    Example:
        >>> printable("gr\x1b[2Jeat\nfilm")
        'gr\\x1b[2Jeat\nfilm'
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def page_text(text: str) -> str:
    r"""Return a text that a page shows as it is, without taking any of it for HTML or Markdown, as TensorBoard would.

    Example:
        >>> page_text("<b> [a](b)")
        '&lt;b&gt; &#91;a&#93;(b)'
    """
    return html.escape(printable(text)).translate(MARKDOWN)
