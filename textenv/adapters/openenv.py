"""OpenEnv environments, in this process, as games.

Written for openenv 0.10.0 (the package was `openenv-core` up to 0.3). Its traps:

- An environment is a class that a server would run; here no server runs. `reset_async` and `step_async` are not called.
- Actions and observations are pydantic models of the environment's own, which forbid unknown fields: no default turns
  a text into an action, so both functions must be given.
- Reward and end stand in the observation: `reward` may be None, which is 0 here, and there is no truncation: `done`
  ends the game.
- `reset` need not use its seed, and many examples draw ids with `uuid4`: a `GameError` says where a game does not play
  the same again. What the rest of a `State` holds is not looked at.
- It needs fastmcp 3, hence mcp below 2, while verifiers 0.4 pins mcp 2: they do not fit into one Python environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textenv.adapters.game import GameError


class OpenEnvGame:
    """An OpenEnv environment as a game.

    Args:
        env: Makes the environment: the class, or a `functools.partial` of it.
        to_action: The action that a turn means, or None where it means none.
        to_text: What an observation reads like.
        refusal: The reply to a turn that means no action. Nothing is played, and it earns 0.

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
        """Reset the environment with this seed."""
        observation = self.env.reset(seed=seed)
        if observation.done:
            raise GameError(f"Expected a game to begin, but {type(self.env).__name__} is done after `reset`.")
        return self._text(observation), dict(observation.metadata)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action that a text means, if it means one."""
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
