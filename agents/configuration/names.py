"""The names in a configuration, and the building of the objects that they name. Importing this does not load torch."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textenv.checks.trust import Kind, Trust, find_class, is_called_with, only_with

from ..errors import CommandError, Exit
from .config import Named

METRICS = {
    "rouge": "textenv.metrics.overlap:ROUGE",
    "meteor": "textenv.metrics.overlap:METEOR",
    "bleu": "textenv.metrics.overlap:BLEU",
    "sacrebleu": "textenv.metrics.overlap:SacreBLEU",
    "chrf": "textenv.metrics.overlap:ChrF",
    "distinct": "textenv.metrics.surface:Distinct",
    "words": "textenv.metrics.surface:Length",
    "broken": "textenv.metrics.surface:Broken",
    "perplexity": "textenv.metrics.model:Perplexity",
    "intent_accuracy": "textenv.metrics.model:IntentAccuracy",
}
MASKS = {
    "allowed": "textenv.masks.token_masks:AllowedMask",
    "banned": "textenv.masks.token_masks:BannedMask",
    "min_length": "textenv.masks.token_masks:MinLengthMask",
    "regex": "textenv.masks.grammar:RegexMask",
    "json_schema": "textenv.masks.grammar:JSONSchemaMask",
    "grammar": "textenv.masks.grammar:GrammarMask",
}
LOGGERS = {
    "tensorboard": "TensorBoard's event files, in the folder of the run.",
    "curves": "A picture of reward, KL divergence and length over training, in the folder of the run.",
    "wandb": "Weights & Biases; its arguments are those of `wandb.init`, some of which need `--allow wandb`.",
    "trackio": "trackio; its arguments are those of `trackio.init`, some of which need `--allow trackio`.",
    "mlflow": "MLflow; `experiment_name`, `tags`; with `--allow mlflow` also `tracking_uri` and more of `create_run`.",
}
METRIC = Kind(
    "metric",
    "a class with __call__(self, prompts, texts, references)",
    is_called_with("prompts", "texts", "references"),
)
_is_token_mask = is_called_with("vocabulary", method="start")
_is_mask_function = is_called_with("prompt", "preds")
MASK = Kind(
    "mask",
    "a class with start(self, vocabulary), or with __call__(self, prompt, preds)",
    lambda cls: _is_token_mask(cls) or _is_mask_function(cls),
)


def build(named: Named | str, names: Mapping[str, str], kind: Kind, trust: Trust) -> Any:
    """Build the object that a configuration names.

    Args:
        named: A name or "module:Class", with or without arguments.
        names: The known names, and the "module:Class" of each.
        kind: The kind of class that is expected.
        trust: The modules that may be imported.

    Raises:
        CommandError: If the name is unknown, its class may not be imported, or it does not take the arguments.
    """
    spec = Named(named) if isinstance(named, str) else named
    path = names.get(spec.id, spec.id)
    if ":" not in path:
        raise CommandError(f"Expected a {kind.name} among {', '.join(names)} or module:Class, got {spec.id!r}.")
    named_class = find(path, kind, trust)
    with built_for(path, spec.args, trust):
        return call(named_class, spec.args, f"the {kind.name} {spec.id!r}")


def call(function: Callable[..., Any], arguments: Mapping[str, Any], name: str, **ours: Any) -> Any:
    """Call a class or function with the arguments of a configuration and with our own.

    Args:
        function: The class or function.
        arguments: The arguments of the configuration.
        name: The name of the class or function, for messages.
        **ours: Our own arguments.

    Raises:
        CommandError: If the function does not take an argument, lacks one, or sets one itself.
    """
    from textenv.checks.signatures import check_arguments

    try:
        check_arguments(function, {**arguments, **ours}, name)
    except ValueError as error:
        raise CommandError(str(error)) from error
    try:
        return function(**ours, **arguments)
    except TypeError as error:  # a class may pass its **kwargs on to another, whose arguments its signature lacks
        if own := re.search(r"multiple values for keyword argument '(\w+)'", str(error)):
            raise CommandError(f"Expected no argument {own[1]!r} for {name}, which sets it itself.") from error
        raise CommandError(f"Expected the arguments of {name}, got {sorted(map(str, arguments))}: {error}.") from error


@contextmanager
def built_for(path: str, arguments: Mapping[str, Any], trust: Trust) -> Iterator[None]:
    """Within, only permitted modules can be imported, and errors about a configuration's arguments become plain.

    Args:
        path: The class to build, for the message.
        arguments: Its arguments, which may have any type and shape.
        trust: The modules that may be imported meanwhile.

    Raises:
        CommandError: If the class fails on an argument with an error of Python's own, such as an AttributeError.
    """
    with only_with(trust):
        try:
            yield
        except (AttributeError, LookupError, AssertionError, re.error) as error:
            raise CommandError(
                f"Expected arguments that fit {path}, got {dict(arguments)!r:.200}: {type(error).__name__}: {error}."
            ) from error


def find(path: str, kind: Kind, trust: Trust) -> Any:
    """Return the class at "module:Class", as `textenv.checks.trust.find_class` does.

    Raises:
        CommandError: If the module may not be imported, has no such class, or needs a package that is not installed.
    """
    try:
        return find_class(path, kind, trust)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except ModuleNotFoundError as error:
        raise CommandError(f"Expected what {path!r} imports to be installed, got: {error}.", Exit.MISSING) from error


def as_reward(value: Any) -> Any:
    """Return a reward in the form of `textenv.rewards.read_reward`: each {"id", "args"} becomes {"name", **args}.

    Rewards inside of the arguments are converted too.

    Raises:
        CommandError: If the args of a reward are no mapping, or have the key "name".

    Example:
        >>> as_reward({"id": "scale", "args": {"reward": {"id": "vader"}, "factor": 2.0}})
        {'name': 'scale', 'reward': {'name': 'vader'}, 'factor': 2.0}
    """
    if isinstance(value, Named):
        value = {"id": value.id, "args": value.args}
    if isinstance(value, Mapping):
        if "id" in value and value.keys() <= {"id", "args"}:
            args = value.get("args") or {}
            if not isinstance(args, Mapping) or "name" in args:  # a "name" would overwrite the id
                raise CommandError(f"Expected the args of the reward {value['id']!r} by name, got {args!r:.80}.")
            return {"name": value["id"], **{key: as_reward(inner) for key, inner in args.items()}}
        return {key: as_reward(inner) for key, inner in value.items()}
    return [as_reward(inner) for inner in value] if isinstance(value, list) else value


def first_line(path: str) -> str | None:
    """Return the first docstring line of "module:name", read from the source without importing it; None for no module.

    Example:
        >>> first_line("agents.configuration.config:Named")
        'A reward, metric, mask, logger or environment by its name.'
    """
    module, _, name = path.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return None
