"""The two parts of a data set without splits of its own: rows to train on, and a tenth that is held out."""

from __future__ import annotations

from typing import Literal

Part = Literal["train", "held_out"]
HELD_OUT = 0.1  # the share of all rows
