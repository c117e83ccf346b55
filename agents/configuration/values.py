"""The checks of a configuration's values: ranges of numbers, single names as lists, errors in plain words."""

from __future__ import annotations

import functools
import math
import types
from argparse import Action
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from .config import Named

WORDS = {  # by type, for errors and help
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "keys with values, as {key: value}",
    Named: "{id: NAME, args: {...}}",
}


class Limits(NamedTuple):
    """The range of a number.

    Args:
        low: The smallest number.
        high: The largest number.
        above: Whether the range excludes `low` itself.

    Example:
        >>> Limits(0, 1, above=True).has(0.0), str(Limits(1))
        (False, 'to be 1 or more')
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        """Return the range as the rest of a sentence: "to be 1 or more"."""
        if math.isinf(self.low):
            return "to be finite"
        low = f"to be above {self.low:g}" if self.above else f"to be {self.low:g} or more"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:,}"

    def has(self, number: float) -> bool:
        """Return whether a number is finite and in the range."""
        return math.isfinite(number) and self.low <= number <= self.high and not (self.above and number == self.low)


ANY, NOT_NEGATIVE, POSITIVE = Limits(), Limits(0), Limits(0, above=True)
# A seed has 32 bits: SB3 `utils.set_random_seed` gives it to np.random.seed, which takes no more.
AT_LEAST_ONE, SHARE, SEED = Limits(1), Limits(0, 1, above=True), Limits(0, 2**32 - 1)
# The ranges by the last part of a key: the range of "algorithm.n_envs" is under "n_envs".
LIMITS = {
    **dict.fromkeys(("total_tokens", "samples_every", "checkpoint_every", "keep_checkpoints"), AT_LEAST_ONE),
    **dict.fromkeys(("max_new_tokens", "first_layers", "last_layers", "lora_r", "top_k", "top_p_lag"), AT_LEAST_ONE),
    **dict.fromkeys(("n_envs", "n_steps", "batch_size", "micro_batch_tokens", "overlong_tokens"), AT_LEAST_ONE),
    **dict.fromkeys(("every", "n_prompts", "n", "patience"), AT_LEAST_ONE),
    **dict.fromkeys(("max_tokens", "raters", "updates", "min_groups", "max_rollouts", "rollouts"), AT_LEAST_ONE),
    **dict.fromkeys(("trials", "credit"), AT_LEAST_ONE),
    "continuations": Limits(2),  # one alone shows no spread
    **dict.fromkeys(("lora_alpha", "critic_lr_scale", "temperature", "repetition_penalty"), POSITIVE),
    "critic_lambda": Limits(0, 1),
    "lambda_alpha": POSITIVE,
    **dict.fromkeys(("learning_rate", "n_epochs", "target", "horizon", "clip", "max_kl"), POSITIVE),
    **dict.fromkeys(("samples", "critic_warmup", "coef", "kl", "missing_eos_penalty"), NOT_NEGATIVE),
    **dict.fromkeys(("centring", "prompt", "overlong_penalty"), NOT_NEGATIVE),
    **dict.fromkeys(("top_p", "min_p"), SHARE),
    **dict.fromkeys(("on_failure", "low", "high"), ANY),
    "seed": SEED,
    "port": Limits(0, 65_535),
}


def limits_of(key: str) -> Limits:
    """Return the range of a key's number.

    Raises:
        KeyError: If the key has no range, since its value is not a number.

    Example:
        >>> str(limits_of("algorithm.n_envs"))
        'to be 1 or more'
    """
    return LIMITS[key.rpartition(".")[2]]


def in_words(kind: Any) -> str:
    """Return a description of the values of a type.

    Example:
        >>> in_words(float | None), in_words(Literal["norm", "popart"] | None)
        ('a number or null', 'one of norm, popart or null')
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        null_last = sorted(arguments, key=lambda member: member is type(None))
        return " or ".join("null" if member is type(None) else in_words(member) for member in null_last)
    if origin is list:
        return f"a list, as [ONE, ANOTHER], each {in_words(arguments[0])}"
    return WORDS[origin]


def check_values(action: Action) -> None:
    """Make a parser's argument accept a single name as a list, check its range, and refuse values in plain words.

    It wraps jsonargparse `ActionTypeHint._check_type`, which checks values of the command line and of files alike.
    """
    kind = getattr(action, "_typehint", None)
    inner = getattr(action, "_check_type", None)
    if kind is None or inner is None:  # an action without a typed value, such as --help
        return

    @functools.wraps(inner)
    def check_type(value: Any, **options: Any) -> Any:
        try:
            checked = inner(as_list(value) if get_origin(kind) is list else value, **options)
            if _is_misread(kind, checked):
                raise ValueError("a mapping that was read as a name")
        except (TypeError, ValueError) as error:
            shown = f"{value.key}: {value.val}" if hasattr(value, "key") else value
            raise TypeError(f"Expected {action.dest} to be {in_words(kind)}, got {shown!r:.80}.") from error
        if isinstance(checked, (int, float)) and not isinstance(checked, bool):
            limits = limits_of(action.dest)
            if not limits.has(checked):
                raise TypeError(f"Expected {action.dest} {limits}, got {checked}.")
        return checked

    action._check_type = check_type  # type: ignore[attr-defined]


def _is_misread(kind: Any, value: Any) -> bool:
    """Return whether a mapping with other keys than id and args was taken for a name, as `Named | str` allows."""
    names = value if isinstance(value, list) else [value]
    return "Named" in str(kind) and any(isinstance(name, str) and name.strip().startswith(("{", "[")) for name in names)


def as_list(value: Any) -> Any:
    """Return a single name, or a single {id, args}, as a list of one; a list stays as it is.

    Example:
        >>> as_list("rouge"), as_list("[rouge, distinct]"), as_list({"id": "rouge"})
        (['rouge'], '[rouge, distinct]', [{'id': 'rouge'}])
    """
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, str):
        return value
    try:
        loaded = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return value if loaded is None or isinstance(loaded, list) else [loaded]
