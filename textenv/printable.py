"""What a model wrote, made harmless for a terminal."""

import html

# The characters that Markdown takes for markup, as HTML entities, which it leaves alone.
MARKDOWN = {ord(char): f"&#{ord(char)};" for char in "\\`*_[]|"}


def printable(text: str) -> str:
    r"""Return a text whose control characters are shown, not obeyed: a model may write escape codes.

    Lines stay lines; a tab, a carriage return and what turns the direction of writing are shown as Python writes them.

    Example:
        >>> printable("gr\x1b[2Jeat\nfilm")
        'gr\\x1b[2Jeat\nfilm'
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def page_text(text: str) -> str:
    r"""Return a text as TensorBoard's page shows it: what a model wrote is neither HTML nor Markdown there.

    Example:
        >>> page_text("<b> [a](b)")
        '&lt;b&gt; &#91;a&#93;(b)'
    """
    return html.escape(printable(text)).translate(MARKDOWN)
