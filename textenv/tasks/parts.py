"""The two parts of a data set that has none of its own: what is trained on, and the tenth that is held out."""

from __future__ import annotations

from typing import Literal

Part = Literal["train", "held_out"]
HELD_OUT = 0.1  # of all rows
