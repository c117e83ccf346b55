"""The figures of a rollout's texts and prompts by which a reward that is gamed, or prompts that are lost, are seen."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np

from textenv.env import TextEnv
from textenv.prompts.prompts import Prompt

from ..doctor.setting_checks import lacks_template, template_marker

Info = Mapping[str, Any]


class TextFacts(NamedTuple):
    """What the figures need of an episode's text and prompt; texts themselves would be much to send to processes."""

    reward: float
    is_blank: bool
    repetition: float  # the share of the text's pairs of neighbours that it had before
    text: bytes  # a digest, by which equal texts are known
    prompt: bytes  # a digest
    is_cut: bool  # whether the prompt was truncated
    is_plain: bool | None  # whether the prompt lacks the tokenizer's template; None if it has none


class TextFigures:
    """Reads and computes the figures of the episodes of a rollout.

    Args:
        env: The environment, whose tokenizer may have a chat template.
    """

    def __init__(self, env: TextEnv) -> None:
        self.tokenizer, self.marker = env.tokenizer, template_marker(env.tokenizer)
        self._plain: dict[str, bool] = {}  # by prompt, whether it lacks the marker of the template

    def read(self, info: Info) -> TextFacts:
        """Return the facts of the final info of an episode."""
        text, prompt = str(info["text"]), cast("Prompt", info["prompt"])
        return TextFacts(
            reward=float(info["episode"]["r"]),
            is_blank=not text.strip(),
            repetition=repeated_pairs(text),
            text=_digest(text),
            prompt=_digest(str(prompt)),
            is_cut=prompt.n_cut > 0,
            is_plain=self._is_plain(prompt),
        )

    def _is_plain(self, prompt: Prompt) -> bool | None:
        if self.marker is None:
            return None
        if prompt not in self._plain:
            self._plain[prompt] = lacks_template(self.tokenizer, prompt, self.marker)
        return self._plain[prompt]


def text_figures(episodes: Sequence[TextFacts]) -> dict[str, float]:
    """Return the figures of one or more episodes, by their keys in the logs."""
    rewards = np.array([episode.reward for episode in episodes])  # (N,)
    prompts = [episode.prompt for episode in episodes]
    figures = {
        "episode/count": float(len(episodes)),
        "episode/reward_std": float(rewards.std()),
        "text/blank": float(np.mean([episode.is_blank for episode in episodes])),
        "text/repetition": float(np.mean([episode.repetition for episode in episodes])),
        "text/distinct": len({episode.text for episode in episodes}) / len(episodes),
        "prompt/cut": float(np.mean([episode.is_cut for episode in episodes])),
        "prompt/largest_share": Counter(prompts).most_common(1)[0][1] / len(prompts),
        "prompt/signal_share": signal_share(prompts, rewards),
    }
    if episodes[0].is_plain is not None:
        figures["prompt/plain"] = float(np.mean([bool(episode.is_plain) for episode in episodes]))
    return figures


def _digest(text: str) -> bytes:
    """Return a short digest of a text, the same in all processes, which Python's own hash is not."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


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


def signal_share(prompts: Sequence[Hashable], rewards: np.ndarray) -> float:
    """Return the largest share that one prompt has in the sum of squared deviations of the rewards from their mean.

    Args:
        prompts: The prompt of each of N episodes.
        rewards: Their rewards, (N,).

    Example:
        >>> signal_share(["a", "a", "b", "b"], np.array([3.0, -3.0, 1.0, -1.0]))
        0.9
    """
    squares: dict[Hashable, float] = defaultdict(float)
    for prompt, square in zip(prompts, (rewards - rewards.mean()) ** 2, strict=True):
        squares[prompt] += float(square)
    total = sum(squares.values())
    return max(squares.values()) / total if total > 0 else 0.0
