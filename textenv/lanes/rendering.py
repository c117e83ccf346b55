"""The rendering of an observation, as text or as a picture."""

from __future__ import annotations

import numpy as np

from textenv.checks.extras import check_extra, needs
from textenv.episodes.rules import PADDING, SEPARATOR
from textenv.text.printable import printable
from textenv.text.tokenizer import Tokenizer

MODES = ("ansi", "human", "rgb_array")
SIZE = (640, 360)  # width and height of a picture, in pixels: the same for every text, as videos need
FONT_SIZE = 16  # pixels
MARGIN = 12  # pixels on each side


def check_render_mode(mode: str | None) -> None:
    """Check a render mode.

    Raises:
        ValueError: If there is no such mode.
        ImportError: If the mode draws pictures and Pillow is not installed.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"Expected `render_mode` to be one of {[None, *MODES]}, got {mode!r}.")
    if mode == "rgb_array":
        check_extra("plot", "PIL", "render_mode='rgb_array'")


def render_row(tokenizer: Tokenizer, observation: np.ndarray) -> str:
    """Return an observation, (L,), as text: the prompt, a bar, and the text that follows the prompt."""
    end = int(np.flatnonzero(observation == SEPARATOR)[0])
    written = observation[end + 1 :]
    ids = written[written > PADDING].tolist()
    # Prompt and ids are decoded together, since decoding `ids` alone may lose the space before the first word.
    prompt = tokenizer.decode(observation[:end].tolist())
    whole = tokenizer.decode(observation[:end].tolist() + ids)
    return f"{prompt} |{whole[len(prompt) :]}" if whole.startswith(prompt) else f"{prompt} | {tokenizer.decode(ids)}"


def picture(text: str) -> np.ndarray:
    """Draw a text in black on white, (360, 640, 3) uint8; of a text that is too long, only the last lines are drawn.

    The font is Pillow's own: a character that it lacks is drawn as a box.

    Raises:
        ImportError: If Pillow is not installed.

    Example:
        >>> picture("a film | that").shape
        (360, 640, 3)
    """
    with needs("plot", "PIL", "a picture of a text"):
        from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    lines = [""]
    for char in printable(text):
        if char == "\n":
            lines.append("")
        elif font.getlength(lines[-1] + char) <= SIZE[0] - 2 * MARGIN:
            lines[-1] += char
        elif " " in lines[-1].strip() and char != " ":  # the unfinished word moves to a new line
            before, _, word = lines[-1].rpartition(" ")
            lines[-1:] = [before, word + char]
        else:
            lines.append(char.strip())
    image = Image.new("RGB", SIZE, "white")
    height = FONT_SIZE + 4  # the height of a line in pixels, with a gap of 4 to the next one
    shown = lines[-((SIZE[1] - 2 * MARGIN) // height) :]
    for number, line in enumerate(shown):
        ImageDraw.Draw(image).text((MARGIN, MARGIN + number * height), line, "black", font)
    return np.asarray(image).copy()
