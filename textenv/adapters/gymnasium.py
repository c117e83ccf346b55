"""Gymnasium environments with text or discrete spaces as games.

Written for gymnasium 1.4.0. Its traps:

- `reset(seed=...)` seeds the env's own generator and no other: an env that draws from NumPy's global functions is no
  matter here (they are kept for each game), one that keeps a generator of its own is.
- An env may return `terminated` and `truncated` both; the end of the game wins.
- `Discrete(n, start=s)` counts from s, and its observations are NumPy integers.
- `gym.make` adds a time limit for many ids: it truncates, and the turns it counts are actions, not texts.
- A `Text` space has a character set and a length; an action outside is refused before the env sees it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from textenv.adapters.game import GameError


class GymnasiumGame:
    """A Gymnasium environment as a game: observations become texts, turns become actions.

    Args:
        env: An id for `gymnasium.make`, or a function that makes the environment.
        obs_to_text: What an observation reads like. Unset, of a `Text` space itself, of a `Discrete` one its number.
        text_to_action: The action that a turn means, or None where it means none. Unset, of a `Text` space the turn, of
            a `Discrete` one the first number in it.
        refusal: The reply to a turn that means no action, or none in the space. Nothing is played, and it earns 0.
        **kwargs: Arguments of `gymnasium.make`.

    Raises:
        ValueError: If a space is neither and has no function.

    Example:
        >>> game = GymnasiumGame("FrozenLake-v1", is_slippery=False)
        >>> game.reset(seed=0)[0], game.step("go 2")[0], game.step("jump")[0]
        ('0', '1', 'That is no action.')
    """

    def __init__(
        self,
        env: str | Callable[[], gym.Env[Any, Any]],
        obs_to_text: Callable[[Any], str] | None = None,
        text_to_action: Callable[[str], Any] | None = None,
        refusal: str = "That is no action.",
        **kwargs: Any,
    ) -> None:
        if kwargs and not isinstance(env, str):
            raise ValueError(f"Expected arguments {list(kwargs)} with an id alone: give them to the function.")
        self.env = gym.make(env, **kwargs) if isinstance(env, str) else env()
        self.refusal = refusal
        self.obs_to_text = _writer(self.env.observation_space) if obs_to_text is None else obs_to_text
        self.text_to_action = _reader(self.env.action_space) if text_to_action is None else text_to_action

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Reset the environment with this seed."""
        observation, info = self.env.reset(seed=seed)
        return self._text(observation), info

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action that a text means, if it means one."""
        action = self.text_to_action(text)
        if action is None or not self.env.action_space.contains(action):
            return self.refusal, 0.0, False, False, {"refused": True}
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._text(observation), float(reward), bool(terminated), bool(truncated), info

    def _text(self, observation: Any) -> str:
        text = self.obs_to_text(observation)
        if not isinstance(text, str):
            raise GameError(f"Expected `obs_to_text` to return a str, got {text!r:.80}.")
        return text


def _writer(space: spaces.Space[Any]) -> Callable[[Any], str]:
    if not isinstance(space, (spaces.Text, spaces.Discrete)):
        raise ValueError(f"Expected `obs_to_text` for an observation space that is no Text or Discrete, got {space}.")
    return str


def _reader(space: spaces.Space[Any]) -> Callable[[str], Any]:
    if isinstance(space, spaces.Text):
        return str
    if not isinstance(space, spaces.Discrete):
        raise ValueError(f"Expected `text_to_action` for an action space that is no Text or Discrete, got {space}.")
    return first_number


def first_number(text: str) -> int | None:
    """Return the first integer in a text, or None; one of more than 18 digits is none.

    Example:
        >>> first_number("to cell 3, or 4"), first_number("pass")
        (3, None)
    """
    found = re.search(r"-?\d+", text)
    return int(found.group()) if found is not None and len(found.group()) < 19 else None
