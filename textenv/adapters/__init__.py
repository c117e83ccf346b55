"""Other libraries' text games and checked tasks as token environments, in one module per library.

============= =========================================================== ==================================
library       file and class                                              tested with (Python 3.11)
============= =========================================================== ==================================
Gymnasium     `textenv.adapters.gymnasium.GymnasiumGame`                  gymnasium 1.4.0
TextArena     `textenv.adapters.textarena.TextArenaGame`                  textarena 0.7.4
GEM           `textenv.adapters.gem.GemGame`                              gem-llm 0.1.0
OpenEnv       `textenv.adapters.openenv.OpenEnvGame`                      openenv 0.10.0
verifiers     `textenv.adapters.verifiers.VerifiersGame`                  verifiers 0.4.0
reasoning-gym `textenv.adapters.reasoning_gym.ReasoningGym`               reasoning_gym 0.1.25
============= =========================================================== ==================================

Games share one protocol, `Game`, and `TurnEnv` plays them; `ReasoningGym` is an environment itself. None of these
libraries is a dependency: a module imports its library only when it is used. The module's docstring lists the library's
traps.
"""

from textenv.adapters.game import Game, GameError, Outcome
from textenv.adapters.tools import Calculator, ToolGame
from textenv.adapters.turn_env import TurnEnv

__all__ = ["Calculator", "Game", "GameError", "Outcome", "ToolGame", "TurnEnv"]
