"""OpenEnv environments as games, run in this process.

Written for openenv 0.10.0 (the package was called `openenv-core` up to 0.3). Its traps:

- An environment is a class that a server would run; no server runs here, and `reset_async` and `step_async` are not
  called.
- Actions and observations are pydantic models of each environment, which forbid unknown fields. So there is no default
  that turns a text into an action, and both functions must be given.
- Reward and end are fields of the observation. A `reward` of None counts as 0. There is no truncation: `done`
  terminates the game.
- `reset` need not use its seed, and many examples draw ids with `uuid4`. A game whose texts differ when it is played
  again raises a `GameError`; the rest of its `State` is not compared.
- It needs fastmcp 3, which needs mcp below 2, while verifiers 0.4 pins mcp 2: the two cannot share an environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textenv.adapters.game import GameError


class OpenEnvGame:
    """An OpenEnv environment as a game.

    Args:
        env: A function that makes the environment: its class, or a `functools.partial` of it.
        to_action: A function from a turn's text to its action, or to None if it has none.
        to_text: A function from an observation to its text.
        refusal: The reply to a turn without an action. No action is played, and the turn earns 0.

    Example:
        >>> from functools import partial
        >>> from textenv.adapters import TurnEnv
        >>> # make_game = partial(OpenEnvGame, EchoEnvironment, to_action=lambda text: EchoAction(message=text),
        >>> #                     to_text=lambda observation: observation.echoed_message)
        >>> # TurnEnv(make_game, tokenizer)
    """

    def __init__(
        self,
        env: Callable[[], Any],
        to_action: Callable[[str], Any],
        to_text: Callable[[Any], str],
        refusal: str = "That is no action.",
    ) -> None:
        self.env = env()
        self.to_action = to_action
        self.to_text = to_text
        self.refusal = refusal

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Reset the environment with this seed; return its text and metadata."""
        observation = self.env.reset(seed=seed)
        if observation.done:
            raise GameError(f"Expected a game to begin, but {type(self.env).__name__} is done after `reset`.")
        return self._text(observation), dict(observation.metadata)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action of a text, if it has one; return text, reward, terminated, truncated and info."""
        action = self.to_action(text)
        if action is None:
            return self.refusal, 0.0, False, False, {"refused": True}
        observation = self.env.step(action)
        reward = 0.0 if observation.reward is None else float(observation.reward)
        return self._text(observation), reward, bool(observation.done), False, dict(observation.metadata)

    def _text(self, observation: Any) -> str:
        text = self.to_text(observation)
        if not isinstance(text, str):
            raise GameError(f"Expected `to_text` to return a str, got {text!r:.80}.")
        return text
