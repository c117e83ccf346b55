"""The names of rewards in configuration files and on command lines.

The module of a reward is imported when its name is first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import iscoroutinefunction
from typing import Any

from textenv.checks.signatures import check_arguments
from textenv.checks.trust import Kind, current_trust, find_class, is_called_with
from textenv.episodes.scores import RewardFunction
from textenv.rewards.base import BatchReward, RewardLike

_is_called = is_called_with("prompt", "preds", "done")
REWARD = Kind(
    "reward",
    "a BatchReward, or a class with __call__(self, prompt, preds, done)",
    lambda candidate: issubclass(candidate, BatchReward) or _is_called(candidate),
)
_ROOM = "textenv.rewards"
# The class or function of each name, as "module:name"; `register_reward` adds to it.
REWARDS: dict[str, str] = {
    "zero": f"{_ROOM}.rules:Zero",
    "length": f"{_ROOM}.rules:Length",
    "repetition": f"{_ROOM}.rules:Repetition",
    "keyword": f"{_ROOM}.rules:Keyword",
    "regex": f"{_ROOM}.rules:Regex",
    "format": f"{_ROOM}.rules:Format",
    "sum": f"{_ROOM}.compose:WeightedSum",
    "clip": f"{_ROOM}.compose:Clip",
    "scale": f"{_ROOM}.compose:Scale",
    "gate": f"{_ROOM}.compose:Gate",
    "ensemble": f"{_ROOM}.compose:Ensemble",
    "cached": f"{_ROOM}.compose:Cached",
    "meteor": f"{_ROOM}.overlap:METEOR",
    "rouge": f"{_ROOM}.overlap:ROUGE",
    "bleu": f"{_ROOM}.overlap:BLEU",
    "sacrebleu": f"{_ROOM}.overlap:SacreBLEU",
    "chrf": f"{_ROOM}.overlap:ChrF",
    "vader": f"{_ROOM}.lexicon:Vader",
    "snownlp": f"{_ROOM}.chinese:SnowNLP",
    "classifier": f"{_ROOM}.classifier:Classifier",
    "preference": f"{_ROOM}.preference:Preference",
    "likelihood": f"{_ROOM}.likelihood:Likelihood",
    "similarity": f"{_ROOM}.similarity:Similarity",
    "steps": f"{_ROOM}.steps:StepReward",
    "process": f"{_ROOM}.process_model:ProcessReward",
    "human": f"{_ROOM}.human:HumanReward",
    "async": f"{_ROOM}.asynchronous:AsyncFunction",
    "http": f"{_ROOM}.http_judge:HTTPJudge",
    "chat": f"{_ROOM}.http_judge:ChatJudge",
}


def register_reward(name: str, entry_point: str) -> None:
    """Register a reward under a name.

    Args:
        name: The name, without a colon.
        entry_point: "module:name" of a class, whose instances are the reward, or of a function, which is the reward.

    Raises:
        ValueError: If the name has a colon or belongs to another reward, or the entry point has no colon.

    Example:
        >>> register_reward("vowels", "my_rewards:Vowels")
    """
    if ":" in name or ":" not in entry_point:
        raise ValueError(f"Expected a name and a 'module:name', got {name!r} and {entry_point!r}.")
    # `setdefault` returns the earlier entry point if the name is taken; registering the same one again is allowed.
    if REWARDS.setdefault(name, entry_point) != entry_point:
        raise ValueError(f"Expected a name that is not taken, got {name!r}, which stands for {REWARDS[name]!r}.")


def make_reward(name: str, **options: Any) -> RewardFunction:
    """Return the reward of a registered name, or of a "module:name", whose module is imported.

    Args:
        name: A registered name, or the "module:name" of a class or function (in a configuration, of a class only).
        **options: The arguments of the class. A function takes none.

    Raises:
        ValueError: If the name is unknown, the class has no such argument, or options are given for a function; in a
            configuration, if the command line does not allow the module, or the module defines no such reward.

    Example:
        >>> make_reward("length", target=20)
        Length(target=20, unit='tokens')
    """
    return make_named(name, REWARD, options)


def make_named(name: str, kind: Kind, options: Mapping[str, Any]) -> Any:
    """Return the object of a name as `make_reward` does, for objects of any kind.

    Args:
        name: A registered name of a reward, or the "module:name" of a class or function.
        kind: The kind of object that a configuration may name here.
        options: The arguments of the class.
    """
    entry_point = REWARDS.get(name, name) if isinstance(name, str) else name
    if not isinstance(entry_point, str) or ":" not in entry_point:
        raise ValueError(f"Expected 'module:name' or one of {sorted(REWARDS)}, got {name!r}.")
    trust = current_trust()  # None outside a configuration, where the caller's own code gives the name
    if trust is not None and name not in REWARDS:
        target: Any = find_class(entry_point, kind, trust)  # only a class of this kind, from an allowed module
    else:
        module, _, attribute = entry_point.partition(":")
        target = vars(import_module(module)).get(attribute)
    if isinstance(target, type):
        check_arguments(target, options, f"the {kind.name} {name!r}")
        return target(**options)
    if target is None or options:
        raise ValueError(f"Expected a class{'' if options else ' or function'} at {entry_point!r}, got {target!r}.")
    return target


def read_reward(reward: RewardLike) -> RewardFunction:
    """Return a reward from the forms in which a user may write it: an object, a name, or a mapping of name and options.

    Raises:
        TypeError: If the argument is none of these.
        ValueError: As `make_reward`, or if the mapping has no "name".

    Example:
        >>> read_reward({"name": "scale", "reward": "vader", "factor": 2.0}).factor
        2.0
    """
    if isinstance(reward, str):
        return make_reward(reward)
    if isinstance(reward, Mapping):
        if "name" not in reward:
            raise ValueError(f"Expected the mapping of a reward to have a 'name', got {dict(reward)!r:.80}.")
        return make_reward(**reward)
    if isinstance(reward, type) or not (isinstance(reward, BatchReward) or callable(reward)):
        raise TypeError(f"Expected a reward: a function, an instance of BatchReward or a name; got {reward!r:.80}.")
    if iscoroutinefunction(reward):
        raise TypeError(
            f"Expected AsyncFunction(function) for a coroutine function (prompt, preds), got {reward!r:.80}."
        )
    return reward
