"""What each key of a configuration takes: one name for a list of one, numbers in their range, errors in plain words."""

from __future__ import annotations

import functools
import math
import types
from argparse import Action
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from .config import Named

WORDS = {
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
        low: The least.
        high: The largest.
        above: Whether the least itself is outside.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        """Return the range as it goes on from the name of a key."""
        if math.isinf(self.low):
            return "to be finite"
        low = f"to be above {self.low:g}" if self.above else f"to be {self.low:g} or more"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:,}"

    def has(self, number: float) -> bool:
        """Whether a number, which must be finite, is in the range."""
        return math.isfinite(number) and self.low <= number <= self.high and not (self.above and number == self.low)


ANY, NOT_NEGATIVE, POSITIVE = Limits(), Limits(0), Limits(0, above=True)
AT_LEAST_ONE, SHARE, SEED = Limits(1), Limits(0, 1, above=True), Limits(0, 2**32 - 1)
# By the last part of a key, or the whole of it where parts of that name differ.
LIMITS = {
    **dict.fromkeys(("total_tokens", "samples_every", "checkpoint_every", "keep_checkpoints"), AT_LEAST_ONE),
    **dict.fromkeys(("max_new_tokens", "last_layers", "lora_r", "top_k", "top_p_lag"), AT_LEAST_ONE),
    **dict.fromkeys(("n_envs", "n_steps", "batch_size", "micro_batch_tokens"), AT_LEAST_ONE),
    **dict.fromkeys(("every", "n_prompts", "n", "patience"), AT_LEAST_ONE),
    **dict.fromkeys(("max_tokens", "raters", "updates"), AT_LEAST_ONE),
    **dict.fromkeys(("lora_alpha", "critic_lr_scale", "temperature", "repetition_penalty"), POSITIVE),
    **dict.fromkeys(("learning_rate", "n_epochs", "target", "horizon", "clip"), POSITIVE),
    **dict.fromkeys(("samples", "critic_warmup", "coef", "kl", "missing_eos_penalty"), NOT_NEGATIVE),
    **dict.fromkeys(("centring", "prompt"), NOT_NEGATIVE),
    **dict.fromkeys(("top_p", "min_p"), SHARE),
    **dict.fromkeys(("on_failure", "low", "high"), ANY),
    "seed": SEED,
    "port": Limits(0, 65_535),
}


def limits_of(key: str) -> Limits:
    """Return the range of the number of a key.

    Raises:
        KeyError: If the key has none, and so is no number's.

    Example:
        >>> str(limits_of("algorithm.n_envs"))
        'to be 1 or more'
    """
    return LIMITS[key.rpartition(".")[2]]


def in_words(kind: Any) -> str:
    """Return what a type takes, in words.

    Example:
        >>> in_words(float | None), in_words(Literal["norm", "popart"] | None)
        ('a number or null', 'one of norm, popart or null')
    """
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        ordered = sorted(parts, key=lambda part: part is type(None))
        return " or ".join("null" if part is type(None) else in_words(part) for part in ordered)
    if origin is list:
        return f"a list, as [ONE, ANOTHER], each {in_words(parts[0])}"
    return WORDS[origin]


def check_values(action: Action) -> None:
    """Have a parser's argument take one name for a list of one, and refuse what it does not take in plain words."""
    kind = getattr(action, "_typehint", None)
    inner = getattr(action, "_check_type", None)  # of command line and configuration files alike
    if kind is None or inner is None:  # --help and its like
        return

    @functools.wraps(inner)
    def check_type(value: Any, **options: Any) -> Any:
        given = as_list(value) if get_origin(kind) is list else value
        try:
            found = inner(given, **options)
            if _is_torn(kind, found):
                raise ValueError("a name that is none")
        except (TypeError, ValueError) as error:
            shown = f"{value.key}: {value.val}" if hasattr(value, "key") else value
            raise TypeError(f"Expected {action.dest} to be {in_words(kind)}, got {shown!r:.80}.") from error
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            limits = limits_of(action.dest)
            if not limits.has(found):
                raise TypeError(f"Expected {action.dest} {limits}, got {found}.")
        return found

    action._check_type = check_type  # type: ignore[attr-defined]


def _is_torn(kind: Any, found: Any) -> bool:
    """Whether what should be an id with its args, and has other keys, was taken for a name."""
    names = found if isinstance(found, list) else [found]
    return "Named" in str(kind) and any(isinstance(name, str) and name.strip().startswith(("{", "[")) for name in names)


def as_list(value: Any) -> Any:
    """Return one name, or one id with its args, as a list of one.

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
