"""What names in a configuration stand for, and the objects that are built of them; without torch."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from textenv.trust import Kind, Trust, find_class, is_called_with, only_with

from .config import Named
from .refusal import CommandError, Exit

METRICS = {
    "rouge": "textenv.metrics.overlap:ROUGE",
    "meteor": "textenv.metrics.overlap:METEOR",
    "bleu": "textenv.metrics.overlap:BLEU",
    "sacrebleu": "textenv.metrics.overlap:SacreBLEU",
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
    "wandb": "Weights & Biases; its arguments are those of `wandb.init`, of which some need `--allow wandb`.",
    "trackio": "trackio; its arguments are those of `trackio.init`, of which some need `--allow trackio`.",
    "mlflow": "MLflow; `experiment_name`, `tags`; with `--allow mlflow` `tracking_uri` and others of `create_run`.",
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
    lambda found: _is_token_mask(found) or _is_mask_function(found),
)


def build(named: Named | str, names: Mapping[str, str], kind: Kind, trust: Trust) -> Any:
    """Build the object of a name, or of a "module:Class", with its arguments.

    Raises:
        CommandError: If the name is unknown, its class may not be imported, or its arguments are not those of it.
    """
    one = Named(named) if isinstance(named, str) else named
    path = names.get(one.id, one.id)
    if ":" not in path:
        raise CommandError(f"Expected a {kind.name} among {', '.join(names)} or module:Class, got {one.id!r}.")
    found = find(path, kind, trust)
    with built_for(path, one.args, trust):
        return call(found, one.args, f"the {kind.name} {one.id!r}")


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
        raise CommandError(f"Expected the arguments of {name}, got {sorted(map(str, arguments))}: {error}.") from error


@contextmanager
def built_for(path: str, arguments: Mapping[str, Any], trust: Trust) -> Iterator[None]:
    """Within, something is built of a configuration's names and arguments, which may be of any type and shape.

    Raises:
        CommandError: If it stumbles over one that it has no name for.
    """
    with only_with(trust):
        try:
            yield
        except (AttributeError, LookupError, AssertionError, re.error) as error:
            raise CommandError(
                f"Expected arguments that fit {path}, got {dict(arguments)!r:.200}: {type(error).__name__}: {error}."
            ) from error


def find(path: str, kind: Kind, trust: Trust) -> Any:
    """Return the class that `textenv.trust.find_class` finds.

    Raises:
        CommandError: If its module may not be imported, or it is no such class, or what it imports is missing.
    """
    try:
        return find_class(path, kind, trust)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except ModuleNotFoundError as error:
        raise CommandError(f"Expected what {path!r} imports to be installed, got: {error}.", Exit.MISSING) from error


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
            args = value.get("args") or {}
            if not isinstance(args, Mapping) or "name" in args:  # its name is its id
                raise CommandError(f"Expected the args of the reward {value['id']!r} by name, got {args!r:.80}.")
            return {"name": value["id"], **{key: as_reward(part) for key, part in args.items()}}
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
