"""Classes of your own for examples/configs/own_parts.yml: a reward, a metric and a logger, named by module and class.

textenv train examples/configs/own_parts.yml --allow examples
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter

from textenv import Preds, Prompt
from textenv.metrics import Scores, mean_of


class Mentions:
    """A reward: 1 for a finished text with a word in it.

    Args:
        word: The word.
    """

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        return float(done and self.word in preds.text.split())


class Share:
    """A metric: the share of texts with a word in them.

    Args:
        word: The word, which is the figure's name as well.
    """

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Scores]:
        return {self.word: mean_of([float(self.word in text.split()) for text in texts])}


class Lines(KVWriter):
    """A logger: one line of JSON for each row of figures, with the figures whose names begin with a prefix.

    Args:
        file: The file to which lines are added.
        prefix: The beginning of the names.
    """

    def __init__(self, file: str, prefix: str = "") -> None:
        self.file, self.prefix = Path(file), prefix

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        chosen = {key: float(value) for key, value in key_values.items() if key.startswith(self.prefix)}
        if chosen:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"tokens": step, **chosen}) + "\n")

    def close(self) -> None:
        """Nothing is left open between rows."""
