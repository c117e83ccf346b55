"""The figures of a rollout's texts and prompts by which a reward that is gamed, or prompts that are lost, are seen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np

from textenv.env import TextEnv
from textenv.prompts.prompts import Prompt

from ..doctor.setting_checks import lacks_template, template_marker

Info = Mapping[str, Any]


class TextFigures:
    """Computes the figures of the episodes of a rollout.

    Args:
        env: The environment, whose tokenizer may have a chat template.
    """

    def __init__(self, env: TextEnv) -> None:
        self.tokenizer, self.marker = env.tokenizer, template_marker(env.tokenizer)
        self._plain: dict[str, bool] = {}  # by prompt, whether it lacks the marker of the template

    def of(self, infos: Sequence[Info]) -> dict[str, float]:
        """Return the figures of the final infos of one or more episodes, by their keys in the logs."""
        texts = [str(info["text"]) for info in infos]
        prompts = [cast("Prompt", info["prompt"]) for info in infos]
        rewards = np.array([float(info["episode"]["r"]) for info in infos])  # (N,)
        figures = {
            "episode/count": float(len(infos)),
            "episode/reward_std": float(rewards.std()),
            "text/blank": float(np.mean([not text.strip() for text in texts])),
            "text/repetition": float(np.mean([repeated_pairs(text) for text in texts])),
            "text/distinct": len(set(texts)) / len(texts),
            "prompt/cut": float(np.mean([prompt.n_cut > 0 for prompt in prompts])),
            "prompt/largest_share": Counter(map(str, prompts)).most_common(1)[0][1] / len(prompts),
            "prompt/signal_share": signal_share(prompts, rewards),
        }
        if self.marker is not None:
            figures["prompt/plain"] = float(np.mean([self._is_plain(prompt) for prompt in prompts]))
        return figures

    def _is_plain(self, prompt: Prompt) -> bool:
        assert self.marker is not None
        if prompt not in self._plain:
            self._plain[prompt] = lacks_template(self.tokenizer, prompt, self.marker)
        return self._plain[prompt]


def repeated_pairs(text: str) -> float:
    """Return the share of a text's pairs of neighbours that it had before, 0 to 1; 0 without a pair.

    Neighbours are words, or characters where the text has no spaces, as in Chinese.

    Example:
        >>> repeated_pairs("good good good"), repeated_pairs("a good film")
        (0.5, 0.0)
    """
    words = text.split()
    units = words if len(words) > 1 else list(text)
    pairs = list(pairwise(units))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def signal_share(prompts: Sequence[str], rewards: np.ndarray) -> float:
    """Return the largest share that one prompt has in the sum of squared deviations of the rewards from their mean.

    Args:
        prompts: The prompt of each of N episodes.
        rewards: Their rewards, (N,).

    Example:
        >>> signal_share(["a", "a", "b", "b"], np.array([3.0, -3.0, 1.0, -1.0]))
        0.9
    """
    squares: dict[str, float] = defaultdict(float)
    for prompt, square in zip(prompts, (rewards - rewards.mean()) ** 2, strict=True):
        squares[prompt] += float(square)
    total = sum(squares.values())
    return max(squares.values()) / total if total > 0 else 0.0
