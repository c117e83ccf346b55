"""Policies with the demo's language model built in, for programs that know a policy by its class only."""

from __future__ import annotations

from typing import Any

from ..models.pretrained import Pretrained
from ..policies.lm_policy import LMPolicy
from ..policies.maskable import MaskableLMPolicy
from ..small_models.demo_model import demo_model


class DemoPolicy(LMPolicy):
    """An `LMPolicy` of the demo's model, for "textenv/Demo-v0".

    rl_zoo3's search for hyper-parameters replaces `policy_kwargs` (rl_zoo3 `hyperparams_opt`), and with them `lm`. A
    policy for rl_zoo3 therefore names its model in a class: three lines like these, in a module of your own.

    Args:
        *args: The arguments of `LMPolicy`.
        **kwargs: The arguments of `LMPolicy`; `lm` is the demo's model by default.

    Example:
        >>> from agents.zoo.policies import DemoPolicy
        >>> # PPO(DemoPolicy, gymnasium.make("textenv/Demo-v0"))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_model(kwargs))


class MaskableDemoPolicy(MaskableLMPolicy):
    """A `MaskableLMPolicy` of the demo's model; see `DemoPolicy`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_model(kwargs))


def _with_model(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if "lm" in kwargs else {**kwargs, "lm": Pretrained(str(demo_model()))}
