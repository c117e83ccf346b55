"""The public names of the package, listed once, and the snapshot of their signatures, `tests/whole/public.txt`.

A change of the snapshot must be meant:

    python -m tests.whole.public
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Iterator
from enum import Enum
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import agents
import textenv
from agents.cli.main import VERBS
from tests.helpers.house import PACKAGES, ROOT
from textenv import adapters, metrics, rewards

SNAPSHOT = ROOT / "tests" / "whole" / "public.txt"
WIDTH = 120

# By module, the names that users may import from it. What is not here may change without notice.
PUBLIC = {
    "textenv": textenv.__all__,
    "textenv.adapters": adapters.__all__,
    "textenv.metrics": metrics.__all__,
    "textenv.rewards": rewards.__all__,
    "agents": agents.__all__,
    # Modules that `textenv.__all__` and `agents.__all__` name.
    "textenv.demo": ["NEGATIVE", "POSITIVE", "parses", "prompts", "reviews", "score", "vocabulary"],
    "agents.doctor": ["check"],
    "agents.sft": ["Tuned", "tune"],
    # What needs torch, or the library of an extra, is imported from its own module.
    "textenv.adapters.gem": ["GemGame"],
    "textenv.adapters.gymnasium": ["GymnasiumGame"],
    "textenv.adapters.openenv": ["OpenEnvGame"],
    "textenv.adapters.python_tool": ["PythonTool"],
    "textenv.adapters.reasoning_gym": ["ReasoningGym", "ReasoningItems", "ReasoningScore"],
    "textenv.adapters.textarena": ["TextArenaGame"],
    "textenv.adapters.verifiers": ["VerifiersGame"],
    "textenv.rewards.classifier": ["Classifier"],
    "textenv.rewards.likelihood": ["Likelihood"],
    "textenv.rewards.preference": ["Preference"],
    "textenv.rewards.process_model": ["ProcessReward"],
    "textenv.rewards.reward_stats": ["RewardStats"],
    "textenv.rewards.similarity": ["Similarity"],
    "textenv.rewards.text_model": ["TextModel"],
    "textenv.rewards.text_reader": ["ReadAs", "TextReader"],
    # The tasks, each with the parts that its recipe in `examples/` uses.
    "textenv.tasks.dailydialog": [
        "INTENTS",
        "Conversation",
        "DailyDialog",
        "Dialogue",
        "dialogue_rows",
        "intent_and_meteor",
        "read_dialogues",
        "split_dialogues",
    ],
    "textenv.tasks.dates": ["Dates"],
    "textenv.tasks.demo": ["Demo"],
    "textenv.tasks.hh": ["HH", "Pair", "hold_out", "part_of", "read_pairs"],
    "textenv.tasks.increasing_numbers": ["Increasing", "IncreasingNumbers"],
    "textenv.tasks.random_texts": ["random_texts"],
    "textenv.tasks.reviews": ["LABELS", "Review", "Reviews", "part_of", "read_reviews"],
    "textenv.tasks.zh_reviews": ["PROMPTS", "ZhReviews", "openings", "part_of", "read_rankings", "split_rankings"],
    # People's answers outside the command.
    "textenv.feedback.agreement": ["Agreement", "SelfAgreement", "agreement", "self_agreement"],
    "textenv.feedback.exchange": ["export", "rows_of"],
    "textenv.feedback.records": ["Answer", "Item", "Progress", "Record"],
    "textenv.feedback.store": ["FeedbackStore"],
    # Configurations of rl_zoo3 and of `textenv` name these by their modules.
    "agents.supervised.learned_reward": ["LearnedReward"],
    "agents.zoo.policies": ["DemoPolicy", "MaskableDemoPolicy"],
}


def snapshot() -> str:
    """Return the public names with their signatures, and the arguments of each verb, as lines."""
    entries = [line for module in sorted(PUBLIC) for name in sorted(PUBLIC[module]) for line in entry(module, name)]
    return "\n".join([*entries, *verbs(), ""])


def entry(module: str, name: str) -> Iterator[str]:
    """Yield the lines of a public name: its signature, and those of a class's own public methods and properties."""
    value, path = getattr(load(module), name), f"{module}.{name}"
    if isinstance(value, ModuleType):
        yield f"module {path}"
    elif inspect.isclass(value):
        yield from of_class(path, value)
    elif inspect.isfunction(value):
        yield from signature(f"def {path}", value)
    else:
        yield f"constant {path}"


def load(module: str) -> Any:
    """Return a public module, which another may only name: `agents.sft` is `agents.supervised.sft`."""
    package, _, last = module.rpartition(".")
    return getattr(import_module(package), last) if last in PUBLIC.get(package, ()) else import_module(module)


def of_class(path: str, value: type) -> Iterator[str]:
    """Yield the lines of a class."""
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    head = f"class {path}" + (f" of {bases}" if bases else "")
    yield from signature(head, value) if has_own_arguments(value) else [head]
    if issubclass(value, Enum):
        yield from (f"    {name} = {member.value!r}" for name, member in value.__members__.items())
    for name in sorted(own_members(value)):
        member = inspect.getattr_static(value, name)
        plain = getattr(member, "__func__", member)  # of a class method or a static method
        if inspect.isfunction(plain):
            yield from signature(f"    def {name}", plain)
        else:
            yield f"    property {name}"


def own_members(value: type) -> set[str]:
    """Return the methods and properties of a class, without those that it has from public classes of ours."""
    inherited = {base for other in public_classes() if other in value.__mro__[1:] for base in other.__mro__}
    bases = [base for base in value.__mro__ if base not in inherited and is_ours(base)]
    return {name for base in bases for name, member in vars(base).items() if is_member(name, member)}


@cache
def public_classes() -> frozenset[type]:
    """Return all public classes."""
    values = [getattr(load(module), name) for module, names in PUBLIC.items() for name in names]
    return frozenset(value for value in values if inspect.isclass(value))


def is_ours(value: type) -> bool:
    """Return whether a class is of textenv, and not of a library."""
    return value.__module__.partition(".")[0] in PACKAGES


def is_member(name: str, member: Any) -> bool:
    """Return whether a member of a class is a public method or property."""
    is_kind = inspect.isfunction(member) or isinstance(member, staticmethod | classmethod | property)
    return is_kind and (name == "__call__" or not name.startswith("_"))


def has_own_arguments(value: type) -> bool:
    """Return whether a class of ours, and none of another library, defines the arguments of its constructor."""
    if issubclass(value, Enum) or getattr(value, "_is_protocol", False):
        return False
    makers = [base for base in value.__mro__ if {"__init__", "__new__"} & vars(base).keys()]
    return is_ours(makers[0])


def signature(head: str, function: Any) -> Iterator[str]:
    """Yield a signature as a line, or as one line per parameter if it is long."""
    shown = inspect.signature(function)
    parameters = [parameter for name, parameter in shown.parameters.items() if name not in ("self", "cls")]
    texts = list(itertools.chain.from_iterable(of_parameter(parameter, parameters) for parameter in parameters))
    result = (
        "" if shown.return_annotation is shown.empty or inspect.isclass(function) else text(shown.return_annotation)
    )
    end = f") -> {result}" if result else ")"
    whole = f"{head}({', '.join(texts)}{end}"
    if len(whole) <= WIDTH:
        yield whole
        return
    indent = head[: len(head) - len(head.lstrip())]
    yield from [f"{head}(", *(f"{indent}    {part}," for part in texts), f"{indent}{end}"]


def of_parameter(parameter: inspect.Parameter, all_of_them: list[inspect.Parameter]) -> Iterator[str]:
    """Yield a parameter, after the sign `*` if it is the first that has to be named."""
    kinds = [other.kind for other in all_of_them[: all_of_them.index(parameter)]]
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
    if parameter.kind is parameter.KEYWORD_ONLY and not set(kinds) & set(named):
        yield "*"
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {text(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {value_of(parameter.default)}"
    yield f"{star}{parameter.name}{kind}{default}"


def text(annotation: Any) -> str:
    """Return an annotation as its source has it: most modules keep them as texts."""
    annotation = getattr(annotation, "__forward_arg__", annotation)  # a field of a NamedTuple
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def value_of(default: Any) -> str:
    """Return a default as a text without addresses, which differ from one process to the next."""
    if inspect.isfunction(default) or inspect.isclass(default):
        return str(default.__name__)
    if isinstance(default, Enum):
        return f"{type(default).__name__}.{default.name}"
    shown = repr(default)
    return f"{type(default).__name__}(...)" if " at 0x" in shown else shown


def verbs() -> Iterator[str]:
    """Yield the verbs of the command, and the arguments of each that the public dataclasses do not have."""
    kinds = {name: [kind for kind in (verb.config, verb.options) if kind] for name, verb in VERBS.items()}
    for name, of_verb in kinds.items():
        yield f"verb textenv {name}: {', '.join(kind.__name__ for kind in of_verb)}".removesuffix(": ")
    for kind in dict.fromkeys(itertools.chain.from_iterable(kinds.values())):
        yield from [] if kind in public_classes() else signature(f"arguments {kind.__name__}", kind)


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
    print(f"Wrote {os.path.relpath(SNAPSHOT)}: read `git diff {os.path.relpath(SNAPSHOT)}`.")
