"""The demo's language model as a policy that needs no argument, for programs that name a policy and no model."""

from __future__ import annotations

from typing import Any

from .demo import demo_model
from .maskable import MaskableLMPolicy
from .policies import LMPolicy
from .pretrained import Pretrained


class DemoPolicy(LMPolicy):
    """`LMPolicy` of the demo's model, for "textenv/Demo-v0".

    rl_zoo3's search for hyper-parameters sets `policy_kwargs` anew, and `lm` is lost with the old ones. A class as this
    one, of three lines in a module of one's own, is how a policy there has its model.

    Args:
        *args: Those of `LMPolicy`.
        **kwargs: Those of `LMPolicy`; `lm` is the demo's model by default.

    Example:
        >>> from agents.demo_policies import DemoPolicy
        >>> # PPO(DemoPolicy, gymnasium.make("textenv/Demo-v0"))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_model(kwargs))


class MaskableDemoPolicy(MaskableLMPolicy):
    """`MaskableLMPolicy` of the demo's model; see `DemoPolicy`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_model(kwargs))


def _with_model(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if "lm" in kwargs else {**kwargs, "lm": Pretrained(str(demo_model()))}
