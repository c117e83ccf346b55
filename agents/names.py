"""What names in a configuration stand for, and what may be imported for them; without torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .config import Named
from .refusal import CommandError, Exit

METRICS = {
    "rouge": "textenv.metrics.overlap:ROUGE",
    "meteor": "textenv.metrics.overlap:Meteor",
    "sacrebleu": "textenv.metrics.overlap:BLEU",
    "chrf": "textenv.metrics.overlap:ChrF",
    "distinct": "textenv.metrics.surface:Distinct",
    "words": "textenv.metrics.surface:Length",
    "perplexity": "textenv.metrics.model:Perplexity",
    "intent_accuracy": "textenv.metrics.model:IntentAccuracy",
}
MASKS = {
    "allowed": "textenv.masks:AllowedMask",
    "banned": "textenv.masks:BannedMask",
    "min_length": "textenv.masks:MinLengthMask",
    "regex": "textenv.grammar_masks:RegexMask",
    "json_schema": "textenv.grammar_masks:JSONSchemaMask",
    "grammar": "textenv.grammar_masks:GrammarMask",
}
LOGGERS = {
    "tensorboard": "TensorBoard's events, in the folder of the run.",
    "curves": "A picture of reward, divergence and length, in the folder of the run.",
    "wandb": "Weights & Biases; its arguments are those of `wandb.init`.",
    "trackio": "trackio; its arguments are those of `trackio.init`.",
    "mlflow": "MLflow; `tracking_uri`, `experiment_name`, and the arguments of `MlflowClient.create_run`.",
}
OWN = ("textenv", "agents")
PATH = re.compile(r"([A-Za-z_]\w*)(?:\.\w+)*:([A-Za-z_]\w*)")
LOOSE_PATH = re.compile(r"([A-Za-z_]\w*)(?:\.\w+)*:.*", flags=re.DOTALL)


def check_allowed(value: Any, allowed: Collection[str]) -> None:
    """Raise CommandError if anything in a value of a configuration names a module that may not be imported.

    Example:
        >>> check_allowed({"id": "sum", "args": {"rewards": ["textenv.rewards.rules:Length"]}}, allowed=())
    """
    if isinstance(value, Named):
        check_allowed([value.id, value.args], allowed)
    elif isinstance(value, Mapping):
        for part in value.values():
            check_allowed(part, allowed)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_allowed(part, allowed)
    elif isinstance(value, str) and (found := LOOSE_PATH.fullmatch(value)):
        # "Human: hello" is a text; what begins as a module that is there may be meant to have it imported.
        is_path = PATH.fullmatch(value) is not None or importlib.util.find_spec(found[1]) is not None
        if is_path and found[1] not in (*OWN, *allowed):
            root = found[1]
            raise CommandError(
                f"Expected a configuration that imports {' and '.join(OWN)} only, got {value!r}: if you trust it, add "
                f"--allow {root} to the command."
            )


def look_here() -> None:
    """Have modules looked for in the current folder as well, last of all: those that a user allows by name."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def find(path: str, allowed: Collection[str]) -> Any:
    """Import what "module:name" stands for.

    Raises:
        CommandError: If it may not be imported, or there is no such thing.
    """
    check_allowed(path, allowed)
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise CommandError(
                f"Expected what {path!r} imports to be installed, got: {error}.", Exit.MISSING
            ) from error
        raise CommandError(f"Expected {path!r} to be there, got: {error}.") from error


def build(named: Named | str, names: Mapping[str, str], kind: str, allowed: Collection[str]) -> Any:
    """Build the object of a name, or of a "module:Class", with its arguments.

    Raises:
        CommandError: If the name is unknown, or its arguments are not those of the class.
    """
    one = Named(named) if isinstance(named, str) else named
    path = names.get(one.id, one.id)
    if ":" not in path:
        raise CommandError(f"Expected a {kind} among {', '.join(names)} or module:Class, got {one.id!r}.")
    return call(find(path, allowed), one.args, f"the {kind} {one.id!r}")


def call(made: Callable[..., Any], arguments: Mapping[str, Any], name: str, **given: Any) -> Any:
    """Call a class or function with the arguments of a configuration, beside others that we give it.

    Raises:
        CommandError: If it does not take them, or needs one more, or sets one itself.
    """
    from textenv.signatures import check_arguments  # which loads gymnasium

    try:
        check_arguments(made, {**arguments, **given}, name)
    except ValueError as error:
        raise CommandError(str(error)) from error
    try:
        return made(**given, **arguments)
    except TypeError as error:
        if own := re.search(r"multiple values for keyword argument '(\w+)'", str(error)):
            raise CommandError(f"Expected no argument {own[1]!r} for {name}, which sets it itself.") from error
        raise CommandError(f"Expected the arguments of {name}, got {sorted(arguments)}: {error}.") from error


def as_reward(value: Any) -> Any:
    """Return a reward as `textenv.rewards.read_reward` takes it: {"id", "args"}, also within, as a mapping with a name.

    Example:
        >>> as_reward({"id": "scale", "args": {"reward": {"id": "vader"}, "factor": 2.0}})
        {'name': 'scale', 'reward': {'name': 'vader'}, 'factor': 2.0}
    """
    if isinstance(value, Named):
        value = {"id": value.id, "args": value.args}
    if isinstance(value, Mapping):
        if "id" in value and value.keys() <= {"id", "args"}:
            return {"name": value["id"], **{key: as_reward(part) for key, part in (value.get("args") or {}).items()}}
        return {key: as_reward(part) for key, part in value.items()}
    return [as_reward(part) for part in value] if isinstance(value, list) else value


def first_line(path: str) -> str | None:
    """Return the first line of the docstring of "module:name", from its source; None where there is no such module.

    Example:
        >>> first_line("agents.config:Named")
        'A reward, metric, mask, logger or environment by its name.'
    """
    module, _, name = path.partition(":")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return None
    for node in ast.parse(Path(found.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return None
