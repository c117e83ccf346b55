"""Gymnasium environments with text or discrete spaces as games.

Written for gymnasium 1.4.0. Its traps:

- `reset(seed=...)` seeds the env's `np_random` and no other generator. An env that draws from NumPy's global functions
  is repeatable here all the same (see `Game`); an env with a further generator of its own is not.
- An env may return both `terminated` and `truncated`; `terminated` takes precedence here.
- `Discrete(n, start=s)` counts from s, and its observations are NumPy integers.
- `gym.make` adds a time limit for many ids. It truncates, and counts actions, not turns.
- A `Text` space has a character set and a maximum length; an action outside it is refused before the env sees it.
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
        obs_to_text: A function from an observation to its text. By default, the observation itself for a `Text` space,
            and its number for a `Discrete` space.
        text_to_action: A function from a turn's text to its action, or to None if it has none. By default, the text
            itself for a `Text` space, and the first number in it for a `Discrete` space.
        refusal: The reply to a turn without an action in the space. No action is played, and the turn earns 0.
        **kwargs: Other arguments of `gymnasium.make`.

    Raises:
        ValueError: If a space is neither `Text` nor `Discrete` and its function is missing.

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
        """Reset the environment with this seed; return its text and info."""
        observation, info = self.env.reset(seed=seed)
        return self._text(observation), info

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action of a text, if it has one; return text, reward, terminated, truncated and info."""
        action = self.text_to_action(text)
        # Checked here, since most envs do not check an action that is outside their space.
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
        raise ValueError(
            f"Expected `obs_to_text` for an observation space that is neither Text nor Discrete, got {space}."
        )
    return str


def _reader(space: spaces.Space[Any]) -> Callable[[str], Any]:
    if isinstance(space, spaces.Text):
        return str
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"Expected `text_to_action` for an action space that is neither Text nor Discrete, got {space}."
        )
    return first_number


def first_number(text: str) -> int | None:
    """Return the first integer in a text; None if there is none, or it has more than 18 digits and sign.

    Example:
        >>> first_number("to cell 3, or 4"), first_number("pass")
        (3, None)
    """
    match = re.search(r"-?\d+", text)
    # 18 characters fit int64, in which gymnasium's spaces keep actions.
    return int(match.group()) if match is not None and len(match.group()) < 19 else None
