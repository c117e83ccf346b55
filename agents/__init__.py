"""A language model as a Stable-Baselines3 agent: policy, buffer, vector env, and what trains, scores and exports it.

The names are those of `agents.public`. They are loaded when the first of them is asked for, and torch with them, so
that the command line can say what it does without.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from textenv_command import check_agents

if TYPE_CHECKING:
    from .public import *  # noqa: F403

LIGHT = ("config", "verb_config")  # jsonargparse looks here for their classes; they do not need torch


def __getattr__(name: str) -> Any:
    """Return a public name, and keep all of them."""
    for module in LIGHT:
        found = vars(import_module(f"{__name__}.{module}")).get(name)
        if getattr(found, "__module__", "") == f"{__name__}.{module}":
            return found
    if f"{__name__}.public" not in sys.modules:
        check_agents()
    public = vars(import_module(f"{__name__}.public"))
    if "__all__" in public:  # else it is being loaded, and asks for a module
        globals().update({key: public[key] for key in (*public["__all__"], "__all__")})
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *vars(import_module(f"{__name__}.public"))["__all__"]})
