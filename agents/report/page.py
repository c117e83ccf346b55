"""The page of a report: its data, script and style in one HTML file, which loads nothing and runs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from textenv import __version__

from .words import words

# In this order: each script uses the functions of those before it, and the last one draws the page.
SCRIPTS = ("base.js", "chart.js", "curves.js", "samples.js", "tokens.js", "several.js", "main.js")


def page(title: str, data: Mapping[str, Any]) -> str:
    """Return a page that shows data.

    Texts of models are data in JSON, which the script inserts as text nodes only. A policy in the page's head lets the
    browser run no script but its own, by the script's hash, and load nothing at all.

    Args:
        title: The page's title.
        data: The data, ready for JSON; the keys are those that `main.js` reads.

    Example:
        >>> text = page("a </script> title", {"runs": [{"name": "</script><script>alert(1)</script>"}]})
        >>> text.count("<script"), "alert(1)</script>" in text
        (2, False)
    """
    own = files(__package__).joinpath("static")
    style = files("textenv.feedback").joinpath("static/theme.css").read_text(encoding="utf-8")
    style += own.joinpath("report.css").read_text(encoding="utf-8")
    scripts = "\n".join(own.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{scripts}}})();\n'
    made = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "version": __version__, "words": words()}
    parts = {
        "title": html.escape(clean(title)),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:",
        "style": style,
        "data": inert_json({"title": title, **made, **data}),
        "script": script,
    }
    text = own.joinpath("page.html").read_text(encoding="utf-8")
    before, *pieces = text.split("{{")  # not `replace`, which would also replace inside the parts
    return before + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces))


def inert_json(value: Any) -> str:
    r"""Return a value as JSON that no HTML parser takes for markup, and that any file can hold.

    Raises:
        ValueError: If a number is NaN or infinite.

    Example:
        >>> inert_json("</script> & <!--")
        '"\\u003c/script\\u003e \\u0026 \\u003c!--"'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return clean(text)


def clean(text: str) -> str:
    """Return a text with half characters (lone surrogates), which UTF-8 cannot hold, replaced by question marks."""
    return text.encode("utf-8", "replace").decode()


def _hash(text: str) -> str:
    """Return the name that a Content-Security-Policy has for an inline script or style (W3C, CSP 3, section 8.3)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
